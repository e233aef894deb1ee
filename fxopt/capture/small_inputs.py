"""One forward pass in training mode on small inputs, which leaves no trace in the model or the process."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import nn

from fxopt.capture.dispatch import accepts, takes_any
from fxopt.errors import FxoptError
from fxopt.graph.torch_private import FakeTensorMode, quiet_fakes
from fxopt.graph.view import location_in

WITH_WEIGHTS = (
    "give a config that is complete, as a folder with a config.json or a name on the hub, or what it lacks as "
    "--set FIELD=VALUE; or run one step of the model with its weights, in Python, and print(fxopt.explain(model))"
)
TOKENS = (2, 16)
"""Batch and sequence length of the inputs fxopt makes."""


def check_example_inputs(example_inputs: object) -> None:
    """Check that `example_inputs` are a dict, or None.

    Raises:
        FxoptError: they are something else.
    """
    if example_inputs is not None and not isinstance(example_inputs, dict):
        raise FxoptError(
            f"example_inputs: expected a dict of the forward's keyword arguments, got {type(example_inputs).__name__}\n"
            "name each argument, e.g. {'input_ids': ids, 'labels': ids}"
        )
    unnamed = next((name for name in example_inputs or () if not isinstance(name, str)), None)
    if unnamed is not None:
        raise FxoptError(
            f"example_inputs: expected names of arguments as keys, got {unnamed!r}\n"
            "name each argument, e.g. {'input_ids': ids, 'labels': ids}"
        )


def run_on_small_inputs(model: nn.Module, example_inputs: dict[str, Any] | None) -> None:
    """Run `model` once in training mode; training flags, buffers and random states are put back.

    Raises:
        FxoptError: no inputs could be made, or the model fails on them.
    """
    check_example_inputs(example_inputs)
    inputs = make_small_inputs(model) if example_inputs is None else example_inputs
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    held = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    devices = [device for device in held if device.type == "cuda"]
    try:
        model.train()
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            model(**inputs)
    except FxoptError:
        raise
    except Exception as error:
        given = "small inputs" if example_inputs is None else "the inputs given"
        name = type(model).__name__
        cure = "pass example_inputs, a dict of keyword arguments the model's forward accepts"
        if any(parameter.is_meta for parameter in model.parameters()) and len(held) == 1:
            name, cure = f"{name}, without weights,", WITH_WEIGHTS
            error = find_cause(model, inputs) or error
        raise FxoptError(
            f"model: {name} failed on {given} ({', '.join(inputs)}): "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{_place_of(error)}\n{cure}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                if not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def find_cause(model: nn.Module, inputs: dict[str, Any] | None = None) -> Exception | None:
    """Return why `model` on the meta device fails where nothing asks for a value, None where it does not.

    Code that reads values when it is not captured fails on the meta device whatever the reason why it was not captured.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = {
        name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        for name, value in (make_small_inputs(model) if inputs is None else inputs).items()
    }
    try:
        with quiet_fakes(), mode, torch.enable_grad():
            model(**given)
    except Exception as error:
        return error
    return None


def _place_of(error: Exception) -> str:
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    place = location_in(frames)
    return f" ({place})" if place else ""


def make_small_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return `input_ids`, and `labels` where the model takes them, of `TOKENS` tokens that its embeddings have.

    Raises:
        FxoptError: the model's forward takes no `input_ids`.
    """
    forward = model.forward
    if not (accepts(forward, "input_ids") or takes_any(forward)):
        raise FxoptError(
            f"model: the forward of {type(model).__name__} takes no input_ids, so fxopt cannot make inputs for it\n"
            "pass example_inputs, a dict of keyword arguments"
        )
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    most = max(2, min([64, *sizes]))
    ids = (torch.arange(TOKENS[0] * TOKENS[1]) % (most - 1) + 1).reshape(TOKENS).to(device)
    inputs = {"input_ids": ids}
    if accepts(forward, "labels"):
        inputs["labels"] = ids
    return inputs
