"""The same job by a configuration file: `python recipes/collapse_cli.py fit --config recipes/collapse.yaml`.

A LightningCLI in which ``optimizer`` may be AdaptedGD or any of torch's: see the comments in ``collapse.yaml``.
"""

from collapse_lightning import DigitClassifier, DigitsData, quiet
from pytorch_lightning.cli import LightningCLI

from torch_adapted_gd.lightning.cli import AdaptedCLIMixin


class CollapseCLI(AdaptedCLIMixin, LightningCLI):
    """LightningCLI that knows AdaptedGD."""


def main(arguments: list[str] | None = None) -> None:
    """Run it."""
    quiet()
    CollapseCLI(DigitClassifier, DigitsData, args=arguments, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
