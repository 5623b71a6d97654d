"""`mghf-loss`: compare, calibrate, info, demo, train-inn, eval-inn.

What takes long to import is imported where it is used, so that Ctrl-C meanwhile ends a command like at any other time.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import signal
import sys
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from .compare import Measured

DEVICE_HELP = "cpu, cuda or cuda:N [cuda where there is one, else cpu]"
HEAT_TILE = 128  # of heat maps with PatchNCE
EXTRAS = {"train-inn": "train", "eval-inn": "train"}  # what a command needs where it is not "demo"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, 2 after a one-line error on stderr, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    options = argparse.Namespace(command=None)

    def stop(*_: object) -> None:
        with suppress(RuntimeError):  # a flush is what was interrupted
            sys.stdout.flush()
        os.write(2, _interrupted(options).encode())
        os._exit(130)

    in_main_thread = threading.current_thread() is threading.main_thread()
    usual = in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual:
        # An exception would abort the import of torch's extensions with a core dump, or be swallowed on the way.
        signal.signal(signal.SIGINT, stop)
    try:
        _parser().parse_args(arguments, options)
        options.run(options)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(options.command, "demo")
        # From a checkout, as long as no package index has a release.
        print(f"mghf-loss: error: {error}; it is in the extra {extra}: pip install '.[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(_interrupted(options), end="", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, ValueError, TypeError) as error:  # CheckpointError is a RuntimeError
        print(f"mghf-loss: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return 0


def _interrupted(options: argparse.Namespace) -> str:
    resumes = "; the same command resumes from the last checkpoint" if options.command == "train-inn" else ""
    return f"\nmghf-loss: interrupted{resumes}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mghf-loss", description="MGHF perceptual losses for super-resolution")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = _Formatter

    compare = commands.add_parser(
        "compare",
        help="PSNR, SSIM and every term of two images or two folders",
        description="Print PSNR, SSIM, every term and the total of two images or of two folders of images, and the "
        "same of bicubic interpolation as a yardstick. Files of two folders belong together where their names agree "
        "but for the suffix; others are named and skipped. PNG and TIFF may have 16 bits a channel. All terms are 0 "
        "for equal images. mghf_loss.metric.distance computes the same values in Python.",
        formatter_class=formatter,
    )
    compare.add_argument("sr", type=Path, help="super-resolved image, or folder of images")
    compare.add_argument("gt", type=Path, help="ground truth of the same size, or folder of images")
    compare.add_argument("--csv", type=Path, metavar="OUT.csv", help="write a row for each image")
    compare.add_argument("--json", type=Path, metavar="OUT.json", help="write values, means, settings, skipped files")
    compare.add_argument(
        "--heatmap", type=Path, metavar="OUT", help="write where each term arises: a picture, or a folder of pictures"
    )
    compare.add_argument("--preset", help="preset of MGHFLoss [its default]")
    compare.add_argument(
        "--shift",
        choices=("average", "random", "none"),
        help="shifts of the Haar grid: average is for small images and reports, and slower [the preset's]",
    )
    compare.add_argument("--inn", default="bundled", help="checkpoint of the invertible network")
    compare.add_argument("--dino", action="store_true", help="add the DINO term, which downloads DINOv2 from the Hub")
    compare.add_argument("--patches", type=int, default=256, help="locations of PatchNCE per level of a tile")
    compare.add_argument("--tile", type=int, default=512, help="largest side of a tile in pixels, a multiple of 8")
    compare.add_argument("--device", type=_usable, help=DEVICE_HELP)
    compare.set_defaults(run=_compare)

    info = commands.add_parser(
        "info", help="versions, devices, checkpoint and code path of this installation", formatter_class=formatter
    )
    info.add_argument("--inn", default="bundled", help="checkpoint of the invertible network")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo", help="train a small SR model with and without MGHFLoss", formatter_class=formatter
    )
    demo.add_argument("--out", type=Path, default=Path("mghf-demo"), help="folder for table and pictures")
    demo.add_argument("--steps", type=int, default=500, help="training steps of each model")
    demo.add_argument("--seed", type=int, default=0, help="seed of initialisation and crops")
    demo.add_argument("--device", type=_usable, help=DEVICE_HELP)
    demo.set_defaults(run=_demo)

    calibrate = commands.add_parser(
        "calibrate",
        help="coefficients of a preset for your images or your network",
        description="Print the coefficients with which every term of a preset has the same gradient, relative to L1's, "
        "on your images or with your network as on photographs with the bundled one. The images are degraded by "
        "bicubic x4, or by noise of 25/255. A minute for fifty images on one core.",
        formatter_class=formatter,
    )
    calibrate.add_argument("--images", type=Path, required=True, help="folder of ground truths, searched recursively")
    calibrate.add_argument("--preset", default="balanced", help="preset of MGHFLoss")
    calibrate.add_argument("--inn", default="bundled", help="checkpoint of the invertible network")
    calibrate.add_argument("--task", choices=("sr", "denoise"), help="how images are degraded [the preset's]")
    calibrate.add_argument("--most", type=int, default=50, help="most images that are read, evenly spaced")
    calibrate.add_argument("--device", type=_usable, help=DEVICE_HELP)
    calibrate.set_defaults(run=_calibrate)

    train = commands.add_parser(
        "train-inn",
        help="train an invertible network on your images",
        description="Train an invertible network on your images. The defaults take about an hour on one core of a CPU; "
        "time grows with steps x batch x crop^2. A killed run goes on with the same command. On several GPUs or nodes: "
        "accelerate launch $(which mghf-loss) train-inn ...",
        formatter_class=formatter,
    )
    images = train.add_argument_group("images")
    data = images.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", type=Path, help="folder of images, searched recursively")
    data.add_argument("--dataset", help="name or path for datasets.load_dataset, for instance imagenet-1k")
    images.add_argument("--dataset-config", help="configuration of a dataset that has several")
    images.add_argument("--split", default="train", help="dataset split")
    images.add_argument(
        "--streaming", action="store_true", help="read the dataset from the Hub without a download first"
    )
    images.add_argument("--validation", type=Path, help="folder of images for the held-out code length")
    images.add_argument("--held-out", type=int, default=0, help="training images set aside for it, instead")
    images.add_argument("--crop", type=int, default=96, help="side of a crop in pixels")
    images.add_argument("--least-scale", type=float, default=0.5, help="smallest random reduction of an image")
    images.add_argument("--dead-leaves", type=float, default=0.0, help="fraction of synthetic dead-leaves crops")
    network = train.add_argument_group("network")
    network.add_argument(
        "--variant", default="pyramid", choices=("pyramid", "packet"), help="bands that a level splits"
    )
    network.add_argument("--levels", type=int, default=3, help="Haar levels")
    network.add_argument("--couplings", type=int, default=2, help="coupling modules per level")
    network.add_argument("--hidden", type=int, default=32, help="width of the bottleneck blocks")
    network.add_argument("--clamp", type=float, default=2.0, help="bound of the log-scales")
    network.add_argument("--mixing", default="learned", choices=("learned", "fixed"), help="channel mixing")
    network.add_argument("--noise-floor", type=float, default=12.0, help="noise on the training images, in 1/255")
    training = train.add_argument_group("training")
    training.add_argument("--steps", type=int, default=20_000, help="optimiser steps, the same when a run is resumed")
    training.add_argument("--batch", type=int, default=16, help="crops per step, over all processes")
    training.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine schedule")
    training.add_argument("--ema", type=float, default=0.999, help="decay of the averaged parameters")
    training.add_argument("--precision", choices=("no", "bf16"), help="precision of the conditioning convolutions")
    training.add_argument("--seed", type=int, default=0, help="seed of initialisation, crops and noise")
    training.add_argument("--threads", type=int, default=2, help="threads that decode images, per process")
    training.add_argument("--cpu", action="store_true", help="stay off the GPU")
    output = train.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("runs/inn"), help="folder for network, state, pictures, logs")
    output.add_argument("--save-every", type=int, default=500, help="steps between checkpoints and evaluations")
    output.add_argument("--tensorboard", action="store_true", help="write TensorBoard logs to OUT/logs")
    train.set_defaults(run=_train_inn)

    evaluate = commands.add_parser(
        "eval-inn",
        help="measure an invertible network on photographs, beside the bundled one",
        formatter_class=formatter,
    )
    evaluate.add_argument("images", type=Path, help="folder of images, searched recursively")
    evaluate.add_argument("--inn", default="bundled", help="checkpoint of the invertible network")
    evaluate.add_argument(
        "--noise", type=float, nargs="+", help="noise levels in 1/255 [the network's noise floor, and 0]"
    )
    evaluate.add_argument("--out", type=Path, default=Path("inn-evaluation"), help="folder for tables and figures")
    evaluate.add_argument("--features-of", type=Path, metavar="IMAGE", help="image drawn in features.png [the first]")
    evaluate.add_argument("--device", type=_usable, help=DEVICE_HELP)
    evaluate.set_defaults(run=_eval_inn)
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults but for those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def _usable(name: str | None) -> str:
    """Return the name of a device that works: by default the GPU where there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use device {name!r}: {str(error).splitlines()[0]}") from None
    return name


def _compare(options: argparse.Namespace) -> None:
    from ._files import check_output, format_table
    from .metric import heatmap, tile_slices
    from .mghf import MGHFLoss

    folders = options.sr.is_dir()
    for path, suffix in ((options.csv, ".csv"), (options.json, ".json")):
        if path is not None:
            check_output(path, [suffix])
    if options.heatmap is not None:
        from matplotlib.backend_bases import FigureCanvasBase

        kinds = None if folders else [f".{kind}" for kind in FigureCanvasBase.get_supported_filetypes()]
        check_output(options.heatmap, kinds)
    tile_slices(1, 1, options.tile)  # raises where it is no size of a tile

    from . import compare

    device = _usable(options.device)
    chosen = {name: getattr(options, name) for name in ("preset", "shift") if getattr(options, name) is not None}
    coefficients = {"dino_jsd": 1.0} if options.dino else {}

    def build(patches: int | None) -> MGHFLoss:
        settings = {"coefficients": coefficients, "inn": options.inn, "patches": patches, "cache_gt": True}
        return MGHFLoss(**chosen, **settings).to(device)

    criterion = build(options.patches)
    dense = None if options.heatmap is None else build(None)
    # With all locations PatchNCE takes time with the square of a tile's area.
    heat_tile = min(options.tile, HEAT_TILE) if criterion.coefficients.get("patch_nce") else options.tile

    def draw(values: Measured, sr: Tensor, gt: Tensor) -> None:
        if dense is None:
            return
        path = options.heatmap / f"{values.name}.png" if folders else options.heatmap
        path.parent.mkdir(parents=True, exist_ok=True)
        compare.plot_heatmap(path, sr, gt, heatmap(dense, sr, gt, tile=heat_tile))

    result = compare.compare_files(criterion, options.sr, options.gt, tile=options.tile, device=device, each=draw)
    arrows = compare.ARROWS if _prints(compare.ARROWS) else "^v"
    if folders:
        table = compare.folder_table(result, arrows)
    else:
        table = compare.pair_table(result.images[0], criterion.coefficients, arrows)
    print(format_table(table))
    print(f"Terms are means over tiles of at most {options.tile} x {options.tile} pixels; PSNR and SSIM are of RGB.")
    print("Bicubic x4 is GT reduced to a quarter and enlarged again.")
    if options.csv is not None:
        compare.write_csv(options.csv, result)
    if options.json is not None:
        settings = {"version": __version__, "tile": options.tile, "patches": options.patches, "inn": options.inn}
        settings |= {"preset": options.preset, "shift": criterion.shift}
        compare.write_json(options.json, result, {**settings, "coefficients": dict(criterion.coefficients)})
    for path in filter(None, (options.csv, options.json, options.heatmap)):
        print(f"wrote {path}")
    for name, reason in result.skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if result.skipped:
        print(f"{len(result.images)} pairs compared, {len(result.skipped)} names skipped", file=sys.stderr)


def _prints(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _info(options: argparse.Namespace) -> None:
    import torch

    from . import checkpoints, ops
    from .inn import HighFrequencyINN

    print(f"mghf-loss {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "FrEIA", "timm", "huggingface_hub", "safetensors"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: cpu ({torch.get_num_threads()} threads)" + "".join(f", {name}" for name in names))
    checkpoint = checkpoints.load(options.inn)
    network = HighFrequencyINN.from_pretrained(options.inn)
    size = sum(parameter.numel() for parameter in network.parameters())
    print(f"{checkpoint.source}\n  sha256 {checkpoint.sha256}\n  {size} parameters, {network.config}")
    print(f"ops: {ops.active_path()}")


def _demo(options: argparse.Namespace) -> None:
    from . import _checks
    from ._files import format_table
    from .demo import run_demo

    _checks.integer("--steps", options.steps, least=1)
    device = _usable(options.device)
    table = run_demo(options.out, options.steps, options.seed, device)
    print(f"\nphotographs not trained on, x4, {options.steps} steps, seed {options.seed}, {device}")
    print(format_table(table))
    print(f"wrote {options.out}/table.csv, crops.png (side by side), terms.png (curves)")


def _calibrate(options: argparse.Namespace) -> None:
    from . import _checks
    from ._files import format_table, read_image
    from .calibrate import calibrate
    from .mghf import PRESETS
    from .training.data import list_images

    most = _checks.integer("--most", options.most, least=1)
    paths = list_images(options.images)
    paths = paths[:: -(-len(paths) // most)]
    images = [read_image(path).to(options.device or _usable(None)) for path in paths]
    found = calibrate(images, options.preset, inn=options.inn, task=options.task)
    preset = PRESETS[options.preset].coefficients
    print(format_table([{"term": name, "here": here, "preset": preset[name]} for name, here in found.items()]))
    print(f"\nMGHFLoss({options.preset!r}, coefficients={found!r})  # {len(images)} images")


def _train_inn(options: argparse.Namespace) -> None:
    from dataclasses import fields

    from .inn import INNConfig
    from .training.loop import TrainConfig, train_inn

    def chosen(config: type) -> dict[str, Any]:  # the options are named like the fields
        return {field.name: getattr(options, field.name) for field in fields(config)}

    train_inn(TrainConfig(**chosen(TrainConfig)), INNConfig(**chosen(INNConfig)), options.cpu)


def _eval_inn(options: argparse.Namespace) -> None:
    from . import _checks
    from ._files import format_table
    from .training.evaluation import eval_inn

    for noise in options.noise or ():
        _checks.number("--noise", noise)
    device = _usable(options.device)
    result = eval_inn(options.inn, options.images, options.out, options.noise or (), device, options.features_of)
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    print(f"\n{result.photographs} photographs{skipped}, {options.inn}, {device}")
    print(f"largest error of the inverse: {result.inverse_error:.2g}\n")
    for title, table in (
        ("code length of the same 8-bit pixels in bits per value, lower is better", result.coders),
        ("features, with noise of the network's floor; of a perfect model std is 1, the rest 0", result.levels),
        ("feature MSE over that of white noise, at the pixel MSE of a one-pixel shift", result.responses),
    ):
        print(f"{title}\n{format_table(table)}\n")
    print(f"wrote {options.out}: coders.csv, levels.csv, responses.csv, evaluation.png, features.png")
