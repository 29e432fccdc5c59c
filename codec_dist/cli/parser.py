"""The commands, their options and their help."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from codec_dist import __version__
from codec_dist.cli import commands

STAGE_HELP = {
    "extract": "images to contribution store: Ray actors attribute every shard",
    "train": "contribution store to sparse autoencoders (Ray Train)",
    "summarize": "modes and statistics: what each mode says about the classes",
    "intervene": "causal tests: ablate and preserve the channels of each class's top mode",
    "visualize": "mode maps of the images that load highest on each mode",
    "report": "the HTML report of all that the run holds",
    "run": "all stages in order; those that are done are skipped",
}
EPILOG = "Any setting of the config can be overridden with --section.key value; `codec-dist config keys` lists them."


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the ``--section.key value`` words off a command line; returns (the rest, the overrides).

    An override is known by the dot in its name, which no other option has.
    """
    rest: list[str] = []
    overrides: list[str] = []
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word and remaining:
            overrides.append(remaining.pop(0))
    return rest, overrides


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the chosen command is the ``call`` of its result."""
    parser = _Parser(
        prog="codec-dist",
        description="What hidden units of a vision model do to its output: contribution decomposition (CODEC).",
        epilog=EPILOG + " --debug shows where an error arose.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"codec-dist {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_demo(verbs)
    _add_stages(verbs)
    _add_shards(verbs)
    _add_store(verbs)
    _add_submit(verbs)
    _add_config(verbs)
    return parser


def _command(
    verbs: Any, name: str, call: Callable[[argparse.Namespace], int | None], help: str, *, overrides: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=EPILOG if overrides else None,
        allow_abbrev=False,
    )
    parser.set_defaults(call=call, takes_overrides=overrides)
    return parser


def _group(verbs: Any, name: str, help: str) -> Any:
    parser = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)


def _add_demo(verbs: Any) -> None:
    parser = _command(
        verbs, "demo", commands.demo, "the main job on real handwritten digits, all stages", overrides=True
    )
    parser.add_argument("--out", metavar="DIR", default="runs/digits", help="folder of the run [%(default)s]")


def _add_stages(verbs: Any) -> None:
    for name, text in STAGE_HELP.items():
        parser = _command(verbs, name, commands.stage, text, overrides=True)
        parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
        if name in ("extract", "run"):
            parser.add_argument(
                "--verify",
                action="store_true",
                help="first read all that the store holds, compare it with its checksums, and do again what is damaged",
            )
        parser.set_defaults(stage=name)


def _add_shards(verbs: Any) -> None:
    group = _group(verbs, "shards", "pack images into WebDataset shards, or index shards made by others")
    pack = _command(group, "pack", commands.shards_pack, "pack images into shards with an index")
    pack.add_argument(
        "source",
        metavar="SOURCE",
        help="`digits`, `shapes` (drawn pictures of known parts), Parquet files (one, a quoted pattern or a folder), "
        "or a folder with one subfolder of images per class, in any format that Pillow decodes",
    )
    pack.add_argument("destination", metavar="DEST", help="folder for the shards; new or empty")
    pack.add_argument("--samples-per-shard", type=_count, default=1000, metavar="N", help="[%(default)s]")
    pack.add_argument("--name", default="shard", help="prefix of the shards' names [%(default)s]")
    pack.add_argument("--seed", type=int, default=0, help="seed of the shuffle, and of the shapes [%(default)s]")
    pack.add_argument("--count", type=_count, metavar="N", help="shapes: number of images [10000]")
    pack.add_argument("--size", type=_count, metavar="PIXELS", help="shapes: height and width [64]")
    pack.add_argument(
        "--classes",
        metavar="FILE",
        help="the model's classes, names or WordNet ids in the order of its outputs (JSON, CSV, or text with one per "
        "line; `imagenet` is packaged): labels become places in this list, for data of some of the classes or in "
        "another order; shapes: a number of classes [10]",
    )
    pack.add_argument(
        "--format", dest="image_format", choices=["png", "jpg"], help="shapes: encoding of the images [png]"
    )
    pack.add_argument("--image-column", metavar="NAME", help="Parquet: column of the images [found by its type]")
    pack.add_argument(
        "--label-column", metavar="NAME", help="Parquet: column of the labels, or `none` [found by its name]"
    )
    index = _command(group, "index", commands.shards_index, "scan the headers of shards once and write their index")
    index.add_argument(
        "location", metavar="DIR_OR_URL", help="folder of the shards, or a quoted pattern such as 'DIR/train-*.tar'"
    )
    index.add_argument(
        "--label-field", default="cls", metavar="FIELD", help="member with the label: cls, or json:FIELD [%(default)s]"
    )


def _add_store(verbs: Any) -> None:
    group = _group(verbs, "store", "look into a contribution store")
    info = _command(group, "info", commands.store_info, "layers, quantities, samples and identity of a store")
    digest = _command(
        group, "digest", commands.store_digest, "one number for all that a store holds, whatever its order and chunks"
    )
    verify = _command(
        group,
        "verify",
        commands.store_verify,
        "look for missing, damaged and unexpected files; exit code 0 if all is well",
    )
    verify.add_argument(
        "--quick", action="store_true", help="look at names and sizes of chunks only, instead of reading them all"
    )
    verify.add_argument(
        "--repair", action="store_true", help="forget damaged shards, so that `extract` does exactly these again"
    )
    export = _command(group, "export", commands.store_export, "write a store into a file of the authors' layout (HDF5)")
    for parser in (info, digest, verify, export):
        parser.add_argument("store", metavar="STORE", help="folder or URL of a store, or of a run that has one")
    export.add_argument("file", metavar="FILE", help="the HDF5 file; must not exist")
    export.add_argument("--target", metavar="NAME", help="whose contributions are written [the store's first target]")
    _add_store_import(group)


def _add_store_import(group: Any) -> None:
    parser = _command(group, "import", commands.store_import, "make a store of a file of the authors' layout (HDF5)")
    parser.add_argument("file", metavar="FILE", help="the HDF5 file")
    parser.add_argument("store", metavar="STORE", help="folder or URL of the store")
    parser.add_argument("--layers", metavar="KEY,KEY,...", help="layer keys by layer index [the indices]")
    parser.add_argument(
        "--target", metavar="NAME", default="imported", help="target that the contributions explain [%(default)s]"
    )
    parser.add_argument(
        "--rows-per-shard", type=_count, default=4096, metavar="N", help="rows of each pseudo-shard [%(default)s]"
    )


def _add_submit(verbs: Any) -> None:
    parser = _command(verbs, "submit", commands.submit, "run a stage as a Ray job on a cluster", overrides=True)
    parser.add_argument("stage", metavar="STAGE", choices=sorted(STAGE_HELP), help=", ".join(STAGE_HELP))
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "--address", required=True, metavar="URL", help="the cluster's job server, e.g. http://127.0.0.1:8265"
    )
    parser.add_argument("--working-dir", metavar="DIR", help="folder with your own modules, sent along with the job")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is accepted")


def _add_config(verbs: Any) -> None:
    group = _group(verbs, "config", "show, check or explain a config")
    show = _command(
        group,
        "show",
        commands.config_show,
        "print the config with all defaults and overrides, and check it with model and data as a run does",
        overrides=True,
    )
    show.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    show.add_argument("--no-check", action="store_true", help="print it only: model and data need not be here")
    packaged = _command(group, "packaged", commands.config_packaged, "print a config that comes with the package")
    packaged.add_argument("name", metavar="NAME", nargs="?", help="which one, e.g. sweep; without it: their names")
    _command(group, "schema", commands.config_schema, "the JSON schema of every config, for editors")
    _command(group, "keys", commands.config_keys, "every setting with its default and meaning")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
