"""Where metrics go besides the run's folder: TensorBoard, or Weights & Biases."""

from collections.abc import Callable
from pathlib import Path

from runtime.config import as_dict
from runtime.errors import UserError


def open_tracker(config, stage: str, folder: Path) -> Callable[[dict | None], None] | None:
    """A function that sends a row of metrics on, or ends with ``None``; None if ``config.track`` wants no tracker."""
    if config.track == "none":
        return None
    try:
        return to_tensorboard(folder) if config.track == "tensorboard" else to_wandb(config, stage, folder)
    except ImportError:
        raise UserError(f"--track {config.track} needs the extra: pip install -e '.[track]'") from None


def to_tensorboard(folder: Path) -> Callable[[dict | None], None]:
    from torch.utils.tensorboard import SummaryWriter  # an extra, and seconds to import

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(row: dict | None) -> None:
        if row is None:
            writer.close()
            return
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])

    return send


def to_wandb(config, stage: str, folder: Path) -> Callable[[dict | None], None]:
    import wandb  # an extra, and seconds to import

    handle = wandb.init(
        project="alignbook", name=f"{config.task}/{stage}", dir=str(folder), config=as_dict(config),
        reinit="finish_previous",
    )  # fmt: skip

    def send(row: dict | None) -> None:
        if row is None:
            handle.finish()
        else:
            handle.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    return send
