"""What the docs name is there: links and anchors, files, settings, metrics, variables, commands and their options."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from hycluster.batch.job import Job
from hycluster.cli import app
from hycluster.errors import HyclusterError
from hycluster.settings.model import Model
from hycluster.settings.schema import settings_schema
from hycluster.settings.settings import Settings

ROOT = Path(__file__).parents[1]
CHART = ROOT / "k8s/chart/README.md"
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md", CHART, *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("hycluster", "tests", "docs", "bench", "scripts", "deployments", "jobs", "k8s", "requirements")
# Annotations and labels of Kubernetes' objects look like paths.
ANNOTATION = re.compile(r"hycluster/(settings|egress|clients|role|authenticated-by|pod-security)\b")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# What they say is of vLLM's, by its own names.
FREE = {"engine", "api"}


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def spans() -> Iterator[tuple[Path, str]]:
    """All that the pages have between backticks, but for blocks."""
    for page in PAGES:
        for said in re.findall(r"`([^`\n]+)`", prose(page)):
            yield page, said


@functools.cache
def source() -> str:
    """All that the project is made of, but the docs and this file."""
    kinds = (".py", ".sh", ".yaml", ".jinja", ".tpl", ".txt", ".proto", ".service", ".env", "")
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    files += [ROOT / "Makefile", ROOT / "Dockerfile", ROOT / ".ci/run"]
    return "\n".join(path.read_text() for path in files if path.is_file() and path != Path(__file__))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    shown = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in found]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown}


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            file, _, place = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            if "://" not in link and not (target.exists() and (not place or place in anchors(target))):
                broken.append((page.name, link))
    assert broken == []


def test_files_are_there() -> None:
    names = {path.name for folder in (*FOLDERS, "") for path in (ROOT / folder).glob("**/*" if folder else "*")}
    missing = []
    for page, said in spans():
        path = said.partition("::")[0]
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", path) and not ANNOTATION.match(path):
            there = any(ROOT.glob(path))
        elif re.fullmatch(r"\w[\w-]*\.(py|md|yaml|sh|json|tpl)", path):
            # A file of ours, or one that our code names because it reads or writes it.
            there = path in names or path in source()
        else:
            continue
        if not there:
            missing.append((page.name, said))
    assert missing == []


def test_settings_are_there() -> None:
    schemas = [settings_schema(kind) for kind in (Settings, Model, Job)]
    blocks = {name for schema in schemas for name in schema["properties"]} - FREE
    unknown = []
    for page, said in spans():
        name = re.match(r"(?:models\[\]\.|models\.0\.)?([a-z_]+(?:\.[a-z_]+)+)(?:$|: |=)", said)
        if page == CHART or name is None or name[1].partition(".")[0] not in blocks or name[1].endswith((".py", ".md")):
            continue
        if not any(_has(schema, schema, name[1].split(".")) for schema in schemas):
            unknown.append((page.name, said))
    assert unknown == []


def _has(schema: dict[str, Any], node: dict[str, Any], path: list[str]) -> bool:
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if not path:
        return True
    if path[0] in node.get("properties", {}):
        return _has(schema, node["properties"][path[0]], path[1:])
    return any(_has(schema, each, path) for each in node.get("anyOf", ()) if "$ref" in each)


def test_metrics_variables_and_quantities_are_there() -> None:
    words = set(re.findall(r"\w+", source()))
    unknown = []
    for page, said in spans():
        named = re.findall(r"\bHYCLUSTER_\w+", said)
        if metric := re.fullmatch(r"(hycluster_\w+?)(?:_total|_bucket)?(?:\{[\w,]+\})?", said):
            named.append(metric[1])
        # Settings and options by their last name; the unit tells them.
        named += re.findall(r"^([a-z]+(?:_[a-z]+)*_(?:s|gib|mib|kib|tokens|rows|lines))$", said)
        unknown += [(page.name, name) for name in named if name not in words and f"{name}_total" not in words]
    assert unknown == []


def test_commands_and_their_options_are_there() -> None:
    unknown = []
    root = get_command(app)
    for page in PAGES:
        for words in _commands(page):
            command: Any = root
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            if (words and hasattr(command, "commands")) or not given <= known:
                unknown.append((page.name, words))
    assert unknown == []


def _commands(page: Path) -> Iterator[list[str]]:
    """The words behind ``hycluster`` of each command line, in blocks and between backticks."""
    blocks = [text for language, text in FENCE.findall(page.read_text()) if language in ("", "sh")]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + re.findall(r"`([^`\n]+)`", prose(page))
    for line in lines:
        for found in re.findall(r"(?:^|\.venv/bin/|&& |\| )hycluster ([a-z][^|>&#]*)", line.strip()):
            yield found.split()


def test_targets_of_make_are_there() -> None:
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert named
    assert named <= there


def test_the_readme_names_the_routes_that_are_open() -> None:
    named = set(re.findall(r"`(/[a-z0-9_/]+)`", (ROOT / "README.md").read_text()))
    # By their text, as importing the ingress imports vLLM.
    code = (ROOT / "hycluster/ingress/http.py").read_text().partition("OPEN_ROUTES = frozenset(")[2].partition(")")[0]
    code += re.findall(r"^ROOTS = .*$", (ROOT / "hycluster/batch_api/routes.py").read_text(), re.MULTILINE)[0]
    opened = set(re.findall(r'"(/[^"]+)"', code))
    # What belongs to a route that is named: a page of the schema and its scripts, one response, one model.
    beside = {route for route in opened if "{" in route} | {"/openapi.json", "/docs/oauth2-redirect", "/static"}
    assert named == opened - beside


def test_the_chinese_readme_has_the_commands_and_figures_of_the_english_one() -> None:
    english, chinese = (ROOT / "README.md").read_text(), (ROOT / "README.zh.md").read_text()
    # What it has beside the English one is for Chinese readers: a corpus of theirs.
    for line in re.findall(r"^(\.venv/bin/hycluster [^#\n]*?) *(?:#.*)?$", chinese, re.MULTILINE):
        assert line in english or "corpus-zh" in line
    # Decimals are measurements and versions.
    assert set(re.findall(r"\b\d+\.\d+\b", chinese)) <= set(re.findall(r"\b\d+\.\d+\b", english))
    assert "README.zh.md" in english


def test_the_page_of_errors_is_as_the_code_is() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \| (\d+) \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    kinds = {kind.reason: (kind.grpc_status, kind.http_status) for kind in _kinds(HyclusterError)}
    assert len(rows) > 10
    assert {reason: (code, int(status)) for reason, code, status in rows} == {name: kinds[name] for name, _, _ in rows}


def _kinds(kind: type[HyclusterError]) -> list[type[HyclusterError]]:
    return [kind, *(each for inner in kind.__subclasses__() for each in _kinds(inner))]
