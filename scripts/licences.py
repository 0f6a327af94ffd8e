"""Writes requirements/licences.md: the packages of the images, by what their own metadata says of their licence.

    make licences                     # after make lock; the CPU image's packages are read from .venv
    .venv/bin/python scripts/licences.py --gpu FOLDER    # site-packages that gpu.lock was installed into

A package of gpu.lock that is not here and has not changed keeps its line. One whose licence asks for more than to be
named must have a reason in REASONS, or nothing is written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
OUTPUT = REQUIREMENTS / "licences.md"

# Packages whose metadata name no licence, or name it by its whole text: what the LICENSE file that they ship says.
READ = {
    "instanttensor": "Apache-2.0",
    "oss-harmony": "Apache-2.0",
    "quack-kernels": "Apache-2.0",
    "setuptools": "MIT",
    "tiktoken": "MIT",
    "tokenspeed-mla": "MIT",
}

_NVIDIA = (
    "NVIDIA's own; vLLM or torch for CUDA needs it. Who passes an image on reads its terms: none is published here"
)
_MPL = "weak copyleft by file; used unchanged, its source is on PyPI"
# Why a licence that asks for more than to be named is accepted. By the beginning of the package's name.
_LGPL = (
    "a table of countries, LGPL-2.1; a Python package that anybody can replace, used unchanged, its source is on PyPI"
)
_PSYCOPG = "PostgreSQL's client, LGPL-3.0; a Python package that anybody can replace, used unchanged, source on PyPI"
REASONS = {
    "certifi": _MPL,
    "tqdm": _MPL,
    "pycountry": _LGPL,
    "psycopg": _PSYCOPG,
    "nvidia-": _NVIDIA,
    "cuda-": _NVIDIA,
}
_ASKS_MORE = re.compile(r"GPL|MPL|Mozilla|EPL|CDDL|Proprietary|NVIDIA|Intel|EULA|LicenseRef|unknown", re.IGNORECASE)

HEAD = """# Licences of the packages in the images

Made by `make licences` from requirements/cpu.lock and gpu.lock and from what each package's metadata says; a test
holds the three together. It is of Python packages. What a wheel carries of others is told in its own
`*.dist-info/licenses` (numpy: libgfortran, GPL with the runtime exception; pyzmq: libzmq, MPL; torch: GNU's OpenMP, GPL
with the runtime exception), and Debian's packages in `/usr/share/doc/*/copyright` of the image (bash, wget and GCC are
GPL: separate programs). Not in an image: what only tests need (requirements/dev.lock; hadolint there is GPL-3.0), and
what requirements/left-out*.txt name.
"""


@dataclass(frozen=True)
class Row:
    """A package in an image."""

    name: str
    version: str
    licence: str
    images: str

    @property
    def reason(self) -> str:
        """Why it is accepted; empty if nothing has to be said."""
        if not _ASKS_MORE.search(self.licence):
            return ""
        return next((reason for prefix, reason in REASONS.items() if self.name.startswith(prefix)), "")

    @property
    def asks_more(self) -> bool:
        """Whether its licence asks for more than to be named."""
        return bool(_ASKS_MORE.search(self.licence))


def locked(lock: Path) -> dict[str, str]:
    """Names and versions in a lock."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==([^\s;]+)", lock.read_text(), re.MULTILINE))


def _field(one: Distribution, name: str) -> str:
    return one.metadata[name].strip() if name in one.metadata else ""


def licence(one: Distribution) -> str:
    """What a package says of its licence: the expression, else its one-line field, else its classifiers."""
    stated = _field(one, "License-Expression")
    field = _field(one, "License")
    classifiers = [
        text.split(" :: ")[-1]
        for text in one.metadata.get_all("Classifier") or []
        if text.startswith("License ::") and not text.endswith(("OSI Approved", "DFSG approved"))
    ]
    short = field if field and "\n" not in field and len(field) < 80 else ""
    return READ.get(normal(one.name)) or stated or short or " / ".join(classifiers) or "unknown"


def normal(name: str) -> str:
    """A package's name as locks write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def found(folders: Iterable[Path]) -> dict[tuple[str, str], str]:
    """The licence of each package, by name and version, that is installed in the folders."""
    return {
        (normal(one.name), one.version.partition("+")[0]): licence(one)
        for one in distributions(path=[str(folder) for folder in folders])
    }


def written(text: str) -> list[Row]:
    """The rows of a file that this script wrote."""
    cells = re.findall(r"^\| ([a-z0-9][^|]*) \| ([^|]*) \| ([^|]*) \| (cpu|gpu|both) \|", text, re.MULTILINE)
    return [Row(*row) for row in cells]


def rows(known: dict[tuple[str, str], str]) -> list[Row]:
    """One for each package and version that a lock has.

    Raises:
        KeyError: nobody knows the licence of one.
    """
    cpu = locked(REQUIREMENTS / "cpu.lock") | locked(REQUIREMENTS / "torch-cpu.txt")
    cpu["torch"] = cpu["torch"].partition("+")[0]
    gpu = locked(REQUIREMENTS / "gpu.lock")
    images = dict.fromkeys(cpu.items(), "cpu")
    for pair in gpu.items():
        images[pair] = "both" if pair in images else "gpu"
    return [Row(*pair, known[pair], images[pair]) for pair in sorted(images)]


def page(of: list[Row]) -> str:
    """The file's text."""
    more = [row for row in of if row.asks_more]
    lines = [
        HEAD,
        f"{len(of)} packages; {len(more)} whose licence asks for more than to be named come first.\n",
        "| package | version | licence | image | why it is accepted |",
        "|---|---|---|---|---|",
        *(f"| {row.name} | {row.version} | {row.licence} | {row.images} | {row.reason} |" for row in more),
        "\n| package | version | licence | image |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.version} | {row.licence} | {row.images} |" for row in of if not row.asks_more),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=Path, help="site-packages that gpu.lock was installed into")
    arguments = parser.parse_args()
    before = {(row.name, row.version): row.licence for row in written(OUTPUT.read_text())} if OUTPUT.exists() else {}
    here = Path(sys.prefix) / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    known = before | found([arguments.gpu] if arguments.gpu else []) | found([here])
    try:
        made = rows(known)
    except KeyError as error:
        name, version = error.args[0]
        print(f"licences: {name} {version}: not installed here; install its lock and give --gpu", file=sys.stderr)
        return 1
    if refused := [f"{row.name} {row.version}: {row.licence}" for row in made if row.asks_more and not row.reason]:
        print("licences: neither free of conditions nor in REASONS:", *refused, sep="\n  ", file=sys.stderr)
        return 1
    OUTPUT.write_text(page(made))
    print(f"{OUTPUT.relative_to(REQUIREMENTS.parent)}: {len(made)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
