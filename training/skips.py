"""Steps whose gradient is not finite: which of them are skipped, and when training must end."""

import math

from training.config import TrainConfig


def was_skipped(loss: float, grad_norm: float, dtype: str, config: TrainConfig, state: dict) -> bool:
    """Return whether the step was skipped because of its gradient, and count it in state["skipped"].

    state["skipped_in_row"] is the number of skipped steps since the last that was not; config.skip_nonfinite is the
    most that it may be. With float16 an infinite gradient is normal, as the loss scale is too large then: GradScaler
    skips such a step, and it is not counted. Raises ValueError if training must not go on.
    """
    if math.isfinite(loss) and (math.isfinite(grad_norm) or dtype == "float16"):
        state["skipped_in_row"] = 0
        return False
    if math.isfinite(grad_norm) or state["skipped_in_row"] >= config.skip_nonfinite:
        after = f", after {state['skipped_in_row']} skipped steps in a row" if state["skipped_in_row"] else ""
        raise ValueError(f"loss {loss}, gradient norm {grad_norm}{after}")
    state["skipped"] += 1
    state["skipped_in_row"] += 1
    return True


def told(state: dict) -> str:
    """Return how many steps were skipped, to end a line with; empty if none was."""
    return f", {state['skipped']} steps skipped" if state["skipped"] else ""
