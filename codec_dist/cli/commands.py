"""What each command calls. Packages are imported when a command needs them, so that `--help` is quick."""

import argparse
import json
import sys
from pathlib import Path

from codec_dist.config import config_reference, load_config, packaged_config, packaged_names, shown_config, write_yaml
from codec_dist.config import config_schema as schema_of_config
from codec_dist.utils import Progress


def demo(arguments: argparse.Namespace) -> None:
    """The main job on the packaged digits."""
    from codec_dist.demo import run_demo

    print(run_demo(Path(arguments.out), arguments.overrides))


def stage(arguments: argparse.Namespace) -> None:
    """One stage of a run, or all."""
    from codec_dist.pipeline import run_stages, stages_of_command

    config = load_config(arguments.config, arguments.overrides)
    if getattr(arguments, "verify", False):
        _mend(config.store_location)
    run_stages(config, stages_of_command(arguments.stage))


def _mend(store: str) -> None:
    """Forget what is damaged in a run's store, if it has one: the stage does these shards again."""
    from codec_dist.extraction import mend_store
    from codec_dist.store import Lease, store_exists

    if store_exists(store):
        with Lease(store):
            mend_store(store, full=True)


def submit(arguments: argparse.Namespace) -> int:
    """A stage as a Ray job; the exit code says whether the job succeeded."""
    from codec_dist.pipeline import submit_stage

    config = load_config(arguments.config, arguments.overrides)
    code = Path(arguments.working_dir) if arguments.working_dir else None
    outcome = submit_stage(arguments.stage, config, arguments.address, code=code, wait=not arguments.no_wait)
    print(f"job {outcome.job_id}: {outcome.status}" + (f" ({outcome.message})" if outcome.message else ""))
    return 0 if outcome.succeeded or arguments.no_wait else 1


def shards_pack(arguments: argparse.Namespace) -> None:
    """Images to shards."""
    from codec_dist.cli.pack_command import describe, image_source
    from codec_dist.shards import pack

    source, classes, beside = image_source(arguments)
    index = pack(
        source,
        Path(arguments.destination),
        name=arguments.name,
        samples_per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        classes=classes,
        beside=beside,
    )
    print(describe(index, source))


def shards_index(arguments: argparse.Namespace) -> None:
    """The index of shards made by others."""
    from codec_dist.cli.pack_command import describe
    from codec_dist.shards import build_index
    from codec_dist.utils import CodecError

    index = build_index(arguments.location, label_field=arguments.label_field)
    print(describe(index))
    if index.kept_in is None:
        raise CodecError(
            f"the index of {index.location} cannot be written beside its tars: make the folder writable (a run needs "
            "none there: it keeps its own)"
        )


def store_info(arguments: argparse.Namespace) -> None:
    """A store at a glance."""
    from codec_dist.store import ContributionStore, find_store

    print(ContributionStore(find_store(arguments.store)).info())


def store_digest(arguments: argparse.Namespace) -> None:
    """The digest of a store, alone on the last line."""
    from codec_dist.store import ContributionStore, find_store

    store = ContributionStore(find_store(arguments.store))
    if not store.complete:
        print("the store is not complete: this is the digest of the shards that are done", file=sys.stderr)
    print(store.digest())


def store_verify(arguments: argparse.Namespace) -> int:
    """What is missing or damaged in a store; the exit code says whether anything is."""
    from codec_dist.store import Lease, Ledger, find_store, repair_store, verify_store

    location = find_store(arguments.store)
    with Progress("verify", total=len(Ledger(location).done()), unit="shards") as progress:
        found = verify_store(location, full=not arguments.quick, on_shard=progress.advance)
    print(found)
    if found.ok or not arguments.repair:
        return 0 if found.ok else 1
    with Lease(location):
        redo = repair_store(location, found)
    print(f"repaired  {len(redo):,} shard{'s' if len(redo) != 1 else ''} to do again with `codec-dist extract`")
    return 0 if all(problem.kind != "unexpected" for problem in found.problems) else 1


def store_import(arguments: argparse.Namespace) -> None:
    """A file of the authors' layout to a store."""
    from codec_dist.store import ContributionStore, import_hdf5

    import_hdf5(
        arguments.file,
        arguments.store,
        layers=arguments.layers.split(",") if arguments.layers else None,
        target=arguments.target,
        rows_per_shard=arguments.rows_per_shard,
    )
    print(ContributionStore(arguments.store).info())


def store_export(arguments: argparse.Namespace) -> None:
    """A store to a file of the authors' layout."""
    from codec_dist.store import ContributionStore, export_hdf5, find_store

    store = ContributionStore(find_store(arguments.store))
    export_hdf5(store.location, arguments.file, target=arguments.target)
    print(f"{arguments.file}: {len(store):,} rows of {len(store.layers):,} layers")


def config_show(arguments: argparse.Namespace) -> None:
    """The resolved config; then what any stage would refuse."""
    config = load_config(arguments.config, arguments.overrides)
    # YAML may break a long text into lines, after which nobody could find the credentials in a URL.
    print(write_yaml(shown_config(config).model_dump(mode="json")), end="", flush=True)
    if not arguments.no_check:
        from codec_dist.pipeline import check_config

        check_config(config)


def config_schema(arguments: argparse.Namespace) -> None:
    """The JSON schema of a config."""
    del arguments
    print(json.dumps(schema_of_config(), indent=2))


def config_keys(arguments: argparse.Namespace) -> None:
    """Every setting with its default and meaning."""
    del arguments
    print(config_reference())


def config_packaged(arguments: argparse.Namespace) -> None:
    """A config that comes with the package, or the names of all."""
    print("\n".join(packaged_names()) if arguments.name is None else packaged_config(arguments.name).rstrip())
