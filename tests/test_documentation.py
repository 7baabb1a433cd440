"""What README.md and docs/ say is so: links, commands, options, keys, names of files and tests."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from tiny_project import write_project

from pipeline.cli.main import commands
from pipeline.stages import load_stages

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [README, *PAGES, *sorted((ROOT / "examples").rglob("*.md"))]


def named(path):
    return str(path.relative_to(ROOT))


def sections(path):
    """The text below every heading, up to the next one; a `#` in a block of code is no heading."""
    found, title, code = {}, "", False
    for line in path.read_text().splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            title = line.lstrip("#").strip()
        else:
            found[title] = found.get(title, "") + line + "\n"
    return found


def anchors(path):
    """Of every heading, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in sections(path)}


def code(text):
    """Every line of a block of code, and everything else that is set as code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines() + re.findall(r"`([^`]*)`", rest)


def rows(text):
    """The cells of every line of a table that begins with code, or with a link that is code."""
    lines = re.findall(r"^\| (\[?`.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def test_the_readme_is_short():
    assert README.stat().st_size <= 10_000


@pytest.mark.parametrize("path", [*TEXTS, ROOT / "CHANGELOG.md", ROOT / "DECISIONS.md"], ids=named)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        name, _, anchor = "".join(link).partition("#")
        if "://" not in name:
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), name
            assert not anchor or anchor in anchors(target), anchor


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_a_page_says_first_what_it_is_about_and_is_in_the_readme(path):
    title, empty, sentence = path.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not empty
    assert sentence.startswith("This page ")
    assert f"]({named(path)})" in README.read_text()


@pytest.mark.parametrize("path", [README, ROOT / "docs" / "results.md"], ids=named)
def test_a_table_of_contents_has_every_section(path):
    text = path.read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert re.findall(r"^- \[(.*?)\]\(#", text, re.MULTILINE) == titles


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_files_that_are_named_are_there(path):
    folders = "benchmarks|deploy|docs|examples|metis|pipeline|preprocessing|tests"
    for name in re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]*\.\w+", path.read_text()):
        # What a run makes is named, but not there before.
        assert "/runs/" in name or (ROOT / name).exists(), name


def test_the_tests_that_keep_promises_are_there():
    lines = re.findall(r"^\| \d.*$", (ROOT / "docs" / "guides.md").read_text(), re.MULTILINE)
    assert len(lines) > 40
    for line in lines:
        file = ""
        for path, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", line):
            file = path or file
            assert f"def {test}" in (ROOT / file).read_text(), line


def every_command(group=commands, before=""):
    """Name and options of every command; a group's are `group command`."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} ")
        elif not command.hidden:
            words = (word for option in command.params for word in option.opts)
            yield before + name, {word for word in words if word.startswith("--")}


def test_every_command_is_documented_with_its_options():
    text = sections(ROOT / "docs" / "commands.md")
    known = dict(every_command())
    assert re.findall(r"^\| \[`(.*?)`\]", text["Commands"], re.MULTILINE) == list(known)
    for name, options in known.items():
        said = [row[0] for row in rows(text[name])]
        said += re.findall(r"^Also: .*", text[name], re.MULTILINE)
        assert set(re.findall(r"--[a-z-]+", " ".join(said))) == options, name


@pytest.mark.parametrize("path", TEXTS, ids=named)
def test_commands_that_are_printed_exist(path):
    known = dict(every_command())
    for line in code(path.read_text()):
        if not re.match("kdpipe [a-z]", line):
            continue
        words = shlex.split(line, comments=True)[1:]
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        names = {words[0], " ".join(words[:2])} & set(known)
        assert any(given <= known[name] for name in names), line


def keys(tree, path=""):
    """Section, key and value of everything in the template; a mapping with keys is a section."""
    for key, value in tree.items():
        inner = value[0] if isinstance(value, list) and value else value
        yield path, key, value
        if isinstance(inner, dict) and path != "ingest.data":  # whose mappings are values
            yield from keys(inner, f"{path}.{key}".lstrip("."))


def test_every_key_is_documented_with_its_default():
    text = sections(ROOT / "docs" / "configuration.md")
    [template] = ROOT.glob("pipeline/**/templates/kdpipe.yaml")
    said = {
        f"{section} {row[0]}".replace("Top level ", "").replace(" ", ".").replace("`", ""): row[1]
        for section in text
        for row in rows(text[section])
    }
    found = {f"{p}.{k}".lstrip("."): v for p, k, v in keys(yaml.safe_load(template.read_text()))}
    parents = {name for name in found if any(n.startswith(f"{name}.") for n in found)}
    assert set(said) - parents == set(found) - parents
    for name, default in said.items():
        # The template holds an example where a default is not one value, and a name of its own.
        if default.startswith("`") and name not in ("run", *parents):
            assert yaml.safe_load(default.strip("`")) == found[name], name


# All that the file says is read by ingest; the rest of the run takes a minute on busy cores.
@pytest.mark.parametrize("last", ["ingest", pytest.param("benchmark", marks=pytest.mark.slow)])
def test_the_smallest_config_of_the_readme_runs(tmp_path, last):
    project = write_project(tmp_path)
    text = sections(README)["The smallest kdpipe.yaml"]
    [config] = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (project.root / "kdpipe.yaml").write_text(config)
    quick = (
        "distill.student=test_byobnet distill.epochs=1 calibrate.max_int8_loss=50 "
        "benchmark.min_seconds=0.3 benchmark.min_queries=70 benchmark.min_samples=200 "
        "benchmark.max_device_loss=50"
    )
    changes = [word for change in quick.split() for word in ("--set", change)]
    result = project.kdpipe("run", "--to", last, *changes)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((project.root / "runs" / "default" / "manifest.json").read_text())
    assert manifest["stages"][last]["status"] == "ok"


def test_every_artifact_and_every_gate_is_documented():
    text = sections(ROOT / "docs" / "runs.md")
    made = [(name, stage) for stage, s in load_stages().items() for name in s.outputs.values()]
    assert [(row[0].strip("`"), row[1]) for row in rows(text["What each stage makes"])] == made
    gates = [(name, stage) for stage, s in load_stages().items() for name in s.gate_names]
    assert [(row[0].strip("`"), row[1]) for row in rows(text["Gates"])] == gates


def test_every_extra_is_documented():
    project = (ROOT / "pyproject.toml").read_text()
    extras = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    said = [row[0].strip("`") for row in rows((ROOT / "docs" / "install.md").read_text())]
    assert sorted(said) == sorted(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def test_the_picture_of_the_floors_is_what_the_linter_checks():
    project = (ROOT / "pyproject.toml").read_text()
    floors = re.findall(r"^layers = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL)
    page = sections(ROOT / "docs" / "architecture.md")["The floors"]
    picture = page.split("```")[1].replace(".py", "")
    for layers in floors:
        names = [rf"\b{re.escape(name)}\b" for name in re.findall(r'"(.*?)"', layers)]
        assert re.search(".*".join(names), picture, re.DOTALL), names
