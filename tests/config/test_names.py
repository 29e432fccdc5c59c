"""The name of a run is any text: shown on one line, and the same after it was saved."""

import unicodedata
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from codec_dist.config import load_config, parse_config, save_config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(max_size=200))
@example("réseau 🐘 / 日本語")
@example(" \t\n ")
@example("x" * 200)
@example("a\x00b\nc")
@example("none")
@example("\ud800")
def test_any_text_is_a_name(tmp_path: Path, name: str) -> None:
    sections = {"data": {"shards": "/shards"}, "model": {"spec": "timm:x"}}
    config = parse_config({"run": {"directory": str(tmp_path), "name": name}, **sections})
    shown = config.run.name
    assert shown == shown.strip() != ""
    assert not any(unicodedata.category(each) in ("Cc", "Cs") for each in shown)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").run.name == shown


def test_a_printable_name_stays_as_it_is() -> None:
    sections = {"data": {"shards": "/shards"}, "model": {"spec": "timm:x"}}
    for name in ("few digits", "réseau profond", "👩‍🔬 lab/α=0.5", "x" * 200):
        assert parse_config({"run": {"directory": "/run", "name": name}, **sections}).run.name == name
    assert parse_config({"run": {"directory": "/run", "name": "  "}, **sections}).run.name == "run"
