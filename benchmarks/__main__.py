"""Run the benchmarks one after another and keep what they print as a page.

    python -m benchmarks [NAME ...] [--out docs/performance.md]

Each compares this project with a peer in the same run. The page says on which machine that was; without names all are
run, with names the page keeps its other parts, if they are of the same machine and day. One that fails is named, the
others still run, and the page is left as it was.
"""

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from library.files import write_bytes

HERE = Path(__file__).parent
MAIN = 'if __name__ == "__main__"'  # what only runnable files have
ALL = sorted(file.stem for file in HERE.glob("[!_]*.py") if MAIN in file.read_text())
WIDTH = "120"
VERSIONS = ("torch", "numpy", "scipy")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(ALL)}")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(ALL))
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}")
    failed, sections = [], kept(options.out) if options.names else {}
    for name in options.names or ALL:
        print(f"{name}:", flush=True)
        status, printed = run(name)
        failed += [name] * (status != 0)
        sections[name] = section(name, printed)
    if failed:
        print(f"failed: {', '.join(failed)}; {options.out} is as it was", file=sys.stderr)
        return 1
    write_bytes(options.out, ("\n\n".join([head(), *(sections[name] for name in sorted(sections))]) + "\n").encode())
    print(f"{options.out} is written")
    return 0


def run(name: str) -> tuple[int, str]:
    """The exit status of a benchmark and what it printed, which is shown as it comes."""
    environment = os.environ | {"COLUMNS": WIDTH, "NO_COLOR": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, "\n".join(lines)


def head() -> str:
    """What the page is, and the machine that it is from."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    return (
        "# Performance\n\n"
        "Printed by `make bench`: each part times this project beside what one would use otherwise, both in one run.\n"
        "Seconds are this machine's; ratios are what to compare.\n\n"
        f"Machine: {processor}, {os.cpu_count()} cores, {device}. Python {platform.python_version()}, {versions}. "
        f"{date.today():%Y-%m-%d}."
    )


def kept(page: Path) -> dict[str, str]:
    """The parts of a page that begins as one of this machine and day would; none of another."""
    start, *parts = page.read_text(encoding="utf-8").strip().split("\n\n## ") if page.exists() else [""]
    return {part.partition("\n")[0]: f"## {part}" for part in parts} if start == head() else {}


def section(name: str, printed: str) -> str:
    """The part of one benchmark: its docstring's first paragraph, and what it printed."""
    told = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    return f"## {name}\n\n{told.partition(chr(10) * 2)[0]}\n\n```\n{printed.strip(chr(10))}\n```"


if __name__ == "__main__":
    sys.exit(main())
