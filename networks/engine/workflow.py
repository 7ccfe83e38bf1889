"""The bundle runner that an expression of a config runs in, and the options that it was given."""

from __future__ import annotations

import sys
from traceback import walk_stack

from monai.bundle import ConfigWorkflow

__all__ = ["running_workflow", "typed_options"]


def running_workflow() -> ConfigWorkflow | None:
    """The workflow whose config is evaluated: MONAI hands it to no expression, so it is found among the callers."""
    callers = (frame.f_locals.get("self") for frame, _ in walk_stack(None))
    return next((caller for caller in callers if isinstance(caller, ConfigWorkflow)), None)


def typed_options() -> dict[str, str]:
    """The command line's options as they were typed."""
    typed = {}
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""]):
        option, equals, text = argument.partition("=")
        if option.startswith("--"):
            typed[option[2:].replace("-", "_")] = text if equals else following
    return typed
