"""The demonstration that `fxopt demo` runs: the same training twice, as stock and optimized, compared.

`corpus` makes batches of real English, `models` small models from Hugging Face configs, `training`
trains and measures, `comparison` judges and shows. Nothing in the library imports this package.
"""
