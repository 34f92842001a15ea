"""What README and the docs tell people to type exists, and the Python they show runs."""

import re
from pathlib import Path

import pytest

from manyscale.cli import VERBS, main
from manyscale.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return [code for page in PAGES for code in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)]


def commands() -> list[str]:
    text = "\n".join(page.read_text() for page in PAGES)
    found = re.findall(r"(?:^|`|\$ )(manyscale [^`\n#]+)", text, re.M)
    return sorted({command.split("   ")[0].strip() for command in found})


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command, capsys):
    _, verb, *words = command.split()
    assert verb in VERBS or verb.startswith("-") or verb.isupper(), command
    if verb not in VERBS:
        return
    flags = {word for word in words if word.startswith("--")} - {"--tiny", "--help"}
    place = [verb]
    if verb == "train":
        assert words[0] in RECIPES or words[0].isupper(), command
        place = ["train", words[0] if words[0] in RECIPES else "digits"]
    elif verb in ("plan", "data"):
        place = [verb, words[0]]
    if flags:
        with pytest.raises(SystemExit):
            main([*place, "--help"])
        help_text = capsys.readouterr().out
        for flag in flags:
            assert re.search(rf"{flag}[ ,]", help_text), f"{command}: no {flag}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z]+)", "\n".join(page.read_text() for page in PAGES))) - {"it"}:
        assert f"\n{target}:" in makefile, target


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = blocks("python")
    assert shown
    for code in shown:
        exec(compile(code, "README.md", "exec"), {})


def test_pages_that_readme_links_to_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
