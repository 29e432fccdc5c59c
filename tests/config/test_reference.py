"""What `config keys` shows can be written as it is shown."""

import re
from pathlib import Path

import pytest
import yaml

from codec_dist.config import config_reference, load_config

# Key and help of each; the default stands in the help's last brackets, which may hold others.
HELP = dict(re.findall(r"^  --(\S+)\n((?:(?!  --).*\n?)*)", config_reference(), re.MULTILINE))


def shown_default(text: str) -> str:
    text, depth = text.rstrip(), 0
    for position in reversed(range(len(text))):
        depth += {"]": 1, "[": -1}.get(text[position], 0)
        if depth == 0:
            return text[position + 1 : -1]
    raise AssertionError(text)


@pytest.mark.parametrize("key", HELP)
def test_the_default_that_is_shown_is_taken_and_means_the_default(key: str, tmp_path: Path) -> None:
    default = shown_default(HELP[key])
    if default == "required":
        return
    path = tmp_path / "config.yaml"
    values = {"run": {"directory": "run"}, "data": {"shards": "shards"}, "model": {"spec": "torchvision:resnet18"}}
    path.write_text(yaml.safe_dump(values))
    # Sections of a list of groups, and of optional settings, have defaults of their own only where they are given.
    given = ["--sae.groups", "[{}]"]
    if key.startswith("model.preprocessing."):
        given += ["--model.preprocessing.size", "224"]
    assert load_config(path, [*given, f"--{key}", default]) == load_config(path, given)
