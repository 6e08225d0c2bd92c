"""Rules for the notebooks kept in git, one function each: it returns what is wrong, an empty list if nothing is."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from papermill.translators import papermill_translators

from helpers.tools.refresh import PERSONAL_PATH, WIDGET_VIEW

MAX_CELL_LINES = 12
MAX_FILE_LINES = 40  # of a script that a cell writes
MAX_CELLS = 45
EXERCISES = 4
MAX_FILE_BYTES = 300_000
REPOSITORY = Path(__file__).resolve().parents[2]
NUMBERING = re.compile(r"^(?:第\s*\d+\s*步|步骤\s*\d+|\d+(?:\.\d+)*)[\s.、:：·—-]*")
CODE_FENCE = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)\s*=\s*[\"']([^\"']+)[\"']")
OUTSIDE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//|#)", re.IGNORECASE)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def the_cell(notebook: NotebookNode, code: str) -> NotebookNode:
    """The one code cell with `code` in it."""
    (cell,) = (cell for cell in code_cells(notebook) if code in cell.source)
    return cell


def said(notebook: NotebookNode, code: str) -> str:
    """Everything printed or shown by the one cell with `code` in it, as text."""
    outputs = the_cell(notebook, code).outputs
    return "".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)


def read_notebook(number: str) -> NotebookNode:
    """The notebook in git with this number."""
    (path,) = (REPOSITORY / "notebooks").glob(f"{number}_*.ipynb")
    return nbformat.read(path, as_version=4)


def markdown(notebook: NotebookNode) -> str:
    """All text cells as one text."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def headings(notebook: NotebookNode) -> list[tuple[int, str]]:
    """(level, text) of every heading, lines of code blocks left out."""
    prose = CODE_FENCE.sub("", markdown(notebook))
    return [(len(marks), text.strip()) for marks, text in re.findall(r"^(#{1,6}) +(.+)$", prose, re.MULTILINE)]


def parse(cell: NotebookNode) -> ast.Module:
    """The cell's syntax tree; magics become calls, as IPython runs them."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def parameters_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells tagged `parameters`."""
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


def one_parameters_cell(notebook: NotebookNode) -> list[str]:
    """Exactly one code cell is tagged `parameters`."""
    found = [cell for cell in parameters_cells(notebook) if cell.cell_type == "code"]
    return [] if len(found) == 1 else [f"{len(found)} code cells are tagged parameters, not one"]


def parameters_are_flat_literals(notebook: NotebookNode) -> list[str]:
    """A parameters cell holds only `NAME = literal  # comment`, each on a line of its own."""
    problems = []
    for cell in parameters_cells(notebook):
        commented = _commented_lines(cell.source)
        for statement in ast.parse(cell.source).body:
            line = ast.get_source_segment(cell.source, statement)
            if _parameter_name(statement) is None or not _is_flat(statement.value):
                problems.append(f"not NAME = literal: {line}")
            elif statement.lineno != statement.end_lineno:
                problems.append(f"more than one line: {line}")
            elif statement.lineno not in commented:
                problems.append(f"no trailing comment: {line}")
    return problems


def parameters_are_visible_to_papermill(notebook: NotebookNode) -> list[str]:
    """papermill's inspector sees every parameter (a second = on the line, even in the comment, hides it)."""
    inspect = papermill_translators.find_translator("python3", "python").inspect
    seen = {parameter.name for cell in parameters_cells(notebook) for parameter in inspect(cell)}
    return [f"papermill does not see {name}" for name in parameter_names(notebook) if name not in seen]


def every_parameter_is_read(notebook: NotebookNode) -> list[str]:
    """Every parameter is read in a later code cell."""
    read: set[str] = set()
    cells = notebook.cells
    first = next((i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])), len(cells))
    for cell in cells[first + 1 :]:
        if cell.cell_type == "code":
            names = (node for node in ast.walk(parse(cell)) if isinstance(node, ast.Name))
            read |= {node.id for node in names if isinstance(node.ctx, ast.Load)}
    return [f"{name} is never read" for name in parameter_names(notebook) if name not in read]


def parameter_names(notebook: NotebookNode) -> list[str]:
    """Names assigned in the parameters cell."""
    statements = (statement for cell in parameters_cells(notebook) for statement in ast.parse(cell.source).body)
    return [name for name in map(_parameter_name, statements) if name]


def _parameter_name(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets = [statement.target]
    else:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def _is_flat(value: ast.expr) -> bool:
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        return isinstance(value.operand, ast.Constant) and isinstance(value.operand.value, int | float)
    return isinstance(value, ast.Constant) and isinstance(value.value, str | int | float | bool | None)


def _commented_lines(source: str) -> set[int]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and token.string.strip("# ")}


def code_cells_have_source(notebook: NotebookNode) -> list[str]:
    """No code cell is empty."""
    return [f"code cell {n} is empty" for n, cell in _numbered(notebook) if not cell.source.strip()]


def code_cells_are_short(notebook: NotebookNode) -> list[str]:
    """A code cell has at most 12 lines of code; a script that it writes to a file, 40. Parameters are a list, not code."""
    problems = []
    for n, cell in _numbered(notebook):
        if "parameters" in cell.metadata.get("tags", []):
            continue
        size = sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in cell.source.splitlines())
        if size > (MAX_FILE_LINES if cell.source.startswith("%%writefile") else MAX_CELL_LINES):
            problems.append(f"code cell {n} has {size} lines")
    return problems


def code_is_plain(notebook: NotebookNode) -> list[str]:
    """No walrus, no lambda, no comprehension inside another: a newcomer reads these cells."""
    problems = []
    comprehensions = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    for n, cell in _numbered(notebook):
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.NamedExpr | ast.Lambda):
                problems.append(f"code cell {n} has a {type(node).__name__}")
            if isinstance(node, comprehensions):
                inner = [part for part in ast.walk(node) if isinstance(part, comprehensions)]
                if len(inner) > 1 or len(node.generators) > 1:
                    problems.append(f"code cell {n} has a nested comprehension")
    return problems


def notebook_is_short(notebook: NotebookNode) -> list[str]:
    """At most 45 cells."""
    return [] if len(notebook.cells) <= MAX_CELLS else [f"{len(notebook.cells)} cells"]


def exercises(notebook: NotebookNode) -> list[tuple[str, str]]:
    """(solution, check) of each exercise: the code folded away in a text cell, and the check cell right after it.

    The first line of a check cell is `answer_1 = None ...`; the solution takes its place.
    """
    found = []
    for text, check in zip(notebook.cells, notebook.cells[1:]):
        if check.cell_type == "code" and re.match(r"answer_\d = None", check.source):
            solution = re.search(
                r"<details>.*?^```python\n(.*?)^```.*?</details>", text.source, re.MULTILINE | re.DOTALL
            )
            found.append((solution[1] if solution else "", check.source))
    return found


def has_exercises(notebook: NotebookNode) -> list[str]:
    """Four exercises, each with a folded solution and a check cell."""
    found = exercises(notebook)
    problems = [] if len(found) == EXERCISES else [f"{len(found)} exercises"]
    return problems + [
        f"no folded solution before: {check.splitlines()[0]}" for solution, check in found if not solution
    ]


def execution_counts_are_in_order(notebook: NotebookNode) -> list[str]:
    """The outputs come from one run from top to bottom: counts 1 to n."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def no_error_outputs(notebook: NotebookNode) -> list[str]:
    """No cell shows a traceback."""
    found = (output.ename for cell in code_cells(notebook) for output in cell.outputs if output.output_type == "error")
    return [f"output shows {name}" for name in found]


def no_widget_state(notebook: NotebookNode) -> list[str]:
    """No widget state in the metadata, no output that needs one."""
    problems = ["metadata holds widget state"] if "widgets" in notebook.metadata else []
    for n, cell in _numbered(notebook):
        if any(WIDGET_VIEW in output.get("data", {}) for output in cell.outputs):
            problems.append(f"code cell {n} shows a widget view")
    return problems


def no_run_metadata(notebook: NotebookNode) -> list[str]:
    """Nothing of papermill's or of a clock in the metadata, no injected parameters."""
    problems = ["notebook metadata of papermill"] if "papermill" in notebook.metadata else []
    for index, cell in enumerate(notebook.cells):
        if {"papermill", "execution"} & set(cell.metadata) or "injected" in str(cell.metadata.get("tags")):
            problems.append(f"cell {index} holds metadata of a run")
    return problems


def no_personal_paths(notebook: NotebookNode) -> list[str]:
    """No absolute path of somebody's machine in source or outputs; AutoDL's data disk is everyone's."""
    texts = [cell.source for cell in notebook.cells]
    texts += [text for cell in code_cells(notebook) for output in cell.outputs for text in _texts(output)]
    return [f"personal path {found[0]}" for text in texts for found in PERSONAL_PATH.finditer(text)]


def _texts(value: object) -> Iterator[str]:
    """Every text inside an output, pictures left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not key.startswith("image/") or key == "image/svg+xml":
                yield from _texts(item)


def one_title(notebook: NotebookNode) -> list[str]:
    """Exactly one heading of the first level."""
    titles = [text for level, text in headings(notebook) if level == 1]
    return [] if len(titles) == 1 else [f"{len(titles)} first-level headings: {titles}"]


def has_closing_sections(notebook: NotebookNode) -> list[str]:
    """There is a summary and a troubleshooting section."""
    texts = " ".join(text.lower() for _, text in headings(notebook))
    problems = [] if "小结" in texts else ["no section 小结"]
    if "常见问题" not in texts and "troubleshooting" not in texts:
        problems.append("no section 常见问题 / troubleshooting")
    return problems


def has_headings(notebook: NotebookNode, wanted: list[str]) -> list[str]:
    """Every wanted heading is there, in this order; a number may precede and other words follow it."""
    texts = [text for _, text in headings(notebook)]
    problems, start = [], 0
    for want in wanted:
        place = next((i for i in range(start, len(texts)) if _is(texts[i], want)), None)
        if place is None:
            problems.append(f"missing, or out of order: {want}")
        else:
            start = place + 1
    return problems


def _is(text: str, want: str) -> bool:
    # "部署" is not found in "部署调用": the next character must not go on with the word.
    pattern = re.compile(rf"{re.escape(want)}(?![\w])", re.IGNORECASE)
    return bool(pattern.match(text) or pattern.match(NUMBERING.sub("", text)))


def has_links(notebook: NotebookNode, wanted: list[str]) -> list[str]:
    """Every wanted link is in a text cell."""
    present = set(links(notebook))
    return [f"lost link {link}" for link in wanted if link not in present]


def links(notebook: NotebookNode) -> list[str]:
    """Targets of the links and pictures in text cells, Markdown or HTML."""
    prose = CODE_FENCE.sub("", markdown(notebook))
    return [first or second for first, second in LINK.findall(prose)]


def relative_links_resolve(notebook: NotebookNode, folder: Path, repository: Path = REPOSITORY) -> list[str]:
    """Links without a scheme lead to files of the repository."""
    problems = []
    for link in links(notebook):
        if OUTSIDE.match(link):
            continue
        target = (folder / link.partition("#")[0]).resolve()
        if not target.exists() or not target.is_relative_to(repository.resolve()):
            problems.append(f"link leads nowhere in the repository: {link}")
    return problems


def no_remote_code(notebook: NotebookNode) -> list[str]:
    """`trust_remote_code` is not used: not as a name or argument, nor in a file that a cell writes."""
    word = "trust_remote_code"
    problems = []
    for n, cell in _numbered(notebook):
        for node in ast.walk(parse(cell)):
            names = (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None))
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if word in names or text == word or re.search(rf"{word}\s*=", text):
                problems.append(f"code cell {n} uses {word}")
    return problems


def names_its_kernel(notebook: NotebookNode) -> list[str]:
    """papermill needs the kernel and the language; "python3" exists everywhere."""
    kernel = notebook.metadata.get("kernelspec", {})
    language = notebook.metadata.get("language_info", {}).get("name")
    good = kernel.get("name") == "python3" and language == "python"
    return [] if good else [f"kernel {kernel.get('name')}, language {language}, not python3 and python"]


def file_is_small(file: Path) -> list[str]:
    """A notebook file stays below 300 KB."""
    size = file.stat().st_size
    return [] if size < MAX_FILE_BYTES else [f"{size} bytes"]


def _numbered(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    return enumerate(code_cells(notebook), start=1)


CONTENT_RULES = (
    one_parameters_cell,
    parameters_are_flat_literals,
    parameters_are_visible_to_papermill,
    every_parameter_is_read,
    code_cells_have_source,
    code_cells_are_short,
    code_is_plain,
    notebook_is_short,
    execution_counts_are_in_order,
    no_error_outputs,
    no_widget_state,
    no_run_metadata,
    no_personal_paths,
    one_title,
    has_closing_sections,
    no_remote_code,
    names_its_kernel,
)
