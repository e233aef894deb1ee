"""`fxopt coverage`: what fxopt does to every architecture of the installed transformers, measured on tiny models."""
