"""Write the page of each method, and the index of all documents: `make docs`.

    python docs/pages.py [--check]

A method's page has its head from the room's README, its commands from the tables of jobs, searches and endpoints, and
its claims and figures from what `prism reproduce` wrote. The times in serving.md are those of performance.md. With
--check nothing is written: the exit status is 1 where a file is not what it would be.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs import JOBS, METHODS, SEARCHES  # noqa: E402 - the repository's root must be importable first
from jobs.reproduce import REPRODUCTIONS  # noqa: E402
from serving.app import ENDPOINTS  # noqa: E402

DOCS = ROOT / "docs"
TIMES, TIMES_END = "<!-- `make docs`: from performance.md -->", "<!-- end -->"
DOCUMENTS = {
    "quickstart.md": "from nothing to a trained model behind an endpoint",
    "data-formats.md": "which files each command reads, and what it writes",
    "cluster.md": "many nodes: Ray's launcher, Kubernetes, a trial on one machine, submitting jobs, planning",
    "serving.md": "endpoints in production: tokens, formats, updates, metrics, limits",
    "console.md": "the web console",
    "reliability.md": "what is promised when something breaks, and the test that shows it",
    "performance.md": "times beside those of what one would use otherwise, from `make bench`",
    "adding-a-method.md": "every file of a new method, with a whole example",
}


def main() -> int:
    pages = {DOCS / "methods" / f"{method}.md": page(method) for method in METHODS}
    pages[DOCS / "README.md"] = index()
    pages[DOCS / "serving.md"] = with_times((DOCS / "serving.md").read_text())
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        print("\n".join(f"{path.relative_to(ROOT)} is not what `make docs` writes" for path in stale), end="")
        return int(bool(stale))
    for path in stale:
        path.write_text(pages[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


def page(method: str) -> str:
    """The page of one method."""
    readme = (ROOT / "library" / method / "README.md").read_text()
    head = readme.split("\n\n| to understand")[0].split("\n\n```")[0]
    code = re.search(r"```python\n.*?```", readme, re.DOTALL)
    parts = [
        head.strip(),
        f"How it is built, and what differs from the paper: [library/{method}](../../library/{method}/README.md).",
        "## Commands\n\n" + commands(method),
    ]
    if code:
        parts.append(f"## In a notebook\n\n{code[0]}")
    results = DOCS / "results" / f"{method}.md"
    if results.exists():
        parts.append(claims(results))
    if (DOCS / "performance.md").exists() and f"\n## {method}\n" in (DOCS / "performance.md").read_text():
        parts.append(f"## Performance\n\nBeside its peers: [performance.md](../performance.md#{method}).")
    return "\n\n".join(parts) + "\n"


def commands(method: str) -> str:
    """A table of what can be run, searched, served and reproduced."""
    lines = [(f"prism run {name}", job.summary) for name, job in JOBS.items() if job.method == method]
    lines += [(f"prism tune {name}", summary) for name, summary in SEARCHES.items() if name == method]
    lines += [(f"prism serve {e.name}", e.summary) for e in ENDPOINTS.values() if method in (e.kind, e.model)]
    lines += [(f"prism reproduce {method}", "the paper's claims, measured again")] if method in REPRODUCTIONS else []
    rows = [f"| `{command}` | {summary} |" for command, summary in lines]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def claims(results: Path) -> str:
    """The table of claims and the first figure of a reproduction, with a link to the whole."""
    text = results.read_text()
    table = re.search(r"(^\|.*\n)+", text, re.MULTILINE)
    figures = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    name = f"../results/{results.name}"
    parts = [f"## Results\n\nWritten by `prism reproduce {results.stem}`; the whole: [{results.name}]({name})."]
    if table:
        parts.append(table[0].strip())
    parts += [f"![{title}](../results/{file})" for title, file in figures]
    return "\n\n".join(parts)


def with_times(text: str) -> str:
    """The page about serving, with the ratios that performance.md has of it between its two marks."""
    measured = (DOCS / "performance.md").read_text().partition("\n## serving\n")[2].partition("\n## ")[0]
    head = ["ingress", "endpoint", "many items, of direct", "32 clients, of plain", "one client", "answers/s at 32"]
    rows, ingress = [head, ["---"] * len(head)], ""
    for line in measured.splitlines():
        if title := re.fullmatch(r"\s*ingress (\w+)\s*", line):
            ingress = f"`{title[1]}`"
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        name, way, alone, _, _, answers, *ratios = cells or [""] * 6
        most = answers.rpartition(" ")[2]
        if way == "empty":
            rows.append([ingress, "an empty Serve deployment", "", "", f"{alone.split()[0]} ms in all", most])
        elif way == "prism":
            rows.append([ingress, f"`{name}`", *ratios[:2], f"{ratios[2]} ms", most])
        elif way == "plain":
            rows[-1][-1] += f" (plain {most})"
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    before, _, rest = text.partition(TIMES)
    return f"{before}{TIMES}\n\n{table}\n\n{TIMES_END}{rest.partition(TIMES_END)[2]}"


def index() -> str:
    """The index of documents that are there, and of methods."""
    documents = [f"* [{name}]({name}): {what}" for name, what in DOCUMENTS.items() if (DOCS / name).exists()]
    methods = [f"* [{name}](methods/{name}.md): {method.summary} ({method.paper})" for name, method in METHODS.items()]
    return "\n".join(["# Documents", "", *documents, "", "# Methods", "", *methods, ""])


if __name__ == "__main__":
    sys.exit(main())
