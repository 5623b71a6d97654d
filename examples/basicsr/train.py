"""Train BasicSR's models with the loss: `python train.py -opt options.yml`, on several GPUs with `--launcher pytorch`.

Needs `pip install basicsr==1.4.2`, which builds on Python up to 3.12. BasicSR shows losses, terms and the time left in
its log, and writes validation images to experiments/NAME/visualization.
"""

from pathlib import Path

import mghf_loss.integrations.basicsr  # registers the losses; before anything of BasicSR's  # isort: skip # noqa: F401

from basicsr.train import train_pipeline  # type: ignore[import-not-found]

if __name__ == "__main__":
    train_pipeline(str(Path.cwd()))
