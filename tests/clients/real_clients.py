"""Real clients of OpenAI's API and the real SillyTavern against our server on Nano: python tests/clients/real_clients.py

Every client gets the same requests as plain HTTP and must come to the same prompts, replies and errors. A client that
cannot be had here is listed with the reason. Needs pip, npm and Node; packages go to a temporary folder, or to --packages.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "unit")]

import sillytavern  # noqa: E402
import sillytavern_page  # noqa: E402
import typer  # noqa: E402
from cases import CASES, KEY, Answer, Case  # noqa: E402
from live_server import LiveServer, nano_server  # noqa: E402

import helpers  # noqa: E402
from helpers.chat.fitting import encode_turns  # noqa: E402

PYTHON = ("openai-python", "litellm", "langchain-openai")
NODE = {"openai-node": ["openai"], "vercel-ai": ["ai", "@ai-sdk/openai-compatible"]}
DRIVERS = {"openai-node": "openai_node.mjs", "vercel-ai": "vercel_ai.mjs"}
SILLYTAVERN = "sillytavern@1.19.0"
SAME, NO = "✓", "—"


class NotAvailableError(Exception):
    """A client cannot be had on this machine; the message says why."""


def install(command: list) -> None:
    """Run a command that gets a client. Raises NotAvailableError."""
    if shutil.which(str(command[0])) is None:
        raise NotAvailableError(f"没有 {command[0]} [not installed]")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise NotAvailableError(f"{Path(command[0]).name}：{lines[-1][:200]}")


# --- getting them ----------------------------------------------------------------------------------------------------


def python_with(package: str, folder: Path) -> Path:
    """A Python that has the package."""
    python = folder / "python" / "bin" / "python"
    if not python.exists():
        install([sys.executable, "-m", "venv", folder / "python"])
    install([python, "-m", "pip", "install", "-q", package.removesuffix("-python")])
    return python


def node_modules(folder: Path, packages: list[str]) -> Path:
    """`node_modules` with the packages."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules").exists():
        install(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder, *packages])
    return folder / "node_modules"


def sillytavern_package(folder: Path) -> Path:
    """SillyTavern with its packages inside, as a clone has them: it reads no file outside its own folder."""
    package = folder / "sillytavern" / "package"
    if not package.exists():
        modules = node_modules(folder / "sillytavern", [SILLYTAVERN])
        shutil.move(modules / "sillytavern", package)
        shutil.move(modules, package / "node_modules")
    return package


# --- one client ------------------------------------------------------------------------------------------------------


def run_driver(name: str, folder: Path, url: str, cases: list[Case]) -> tuple[str, dict[str, Answer]]:
    """Version of a client, and what it got."""
    file = folder / "cases.json"
    file.write_text(json.dumps([case.to_json() for case in cases]), encoding="utf-8")
    if name in PYTHON:
        command = [python_with(name, folder), HERE / "drivers" / "python_clients.py", name, url, file]
    else:
        node_modules(folder / name, NODE[name])
        driver = shutil.copy(HERE / "drivers" / DRIVERS[name], folder / name)  # where it finds its packages
        command = ["node", driver, url, file]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-500:])
    version, answers = json.loads(done.stdout.splitlines()[-1])
    return version, {case: Answer(**answer) for case, answer in answers.items()}


def run_sillytavern(folder: Path, url: str, cases: list[Case], prompts: list[str]) -> tuple[str, dict, dict]:
    """Version, what its backend got, and what was seen in its page and of its cards."""
    package = sillytavern_package(folder)
    version = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
    with sillytavern.running(package, folder / "sillytavern" / "data") as address:
        answers = sillytavern.run(address, url, [case.to_json() for case in cases])
        more = sillytavern.card_round_trip(address, folder)
        more |= sillytavern_page.run(address, url, prompts)
    return version, {case: Answer(**answer) for case, answer in answers.items()}, more


# --- what is right ---------------------------------------------------------------------------------------------------


def plain(server: LiveServer, case: Case) -> Answer:
    """What plain HTTP gets."""
    headers = {"Authorization": f"Bearer {case.key}"}
    response = server.client.post("/v1/chat/completions", json={**case.body, "stream": False}, headers=headers)
    content = response.json()
    if response.is_error:
        return Answer(status=response.status_code, error=content["error"]["message"])
    usage, choices = content["usage"], content["choices"]
    finish = [choice["finish_reason"] for choice in choices]
    tokens = [usage["prompt_tokens"], usage["completion_tokens"]]
    return Answer([choice["message"]["content"] for choice in choices], finish, tokens)


def expected(server: LiveServer, prompts: list[str], case: Case) -> Answer:
    """The same, and the case itself is right: its prompt, its stop, its error."""
    answer = plain(server, case)
    if case.stops:
        case.body["stop"] = [answer.texts[0][-1]]
        whole, answer = answer, plain(server, case)
        assert whole.texts[0].startswith(answer.texts[0]) and answer.texts != whole.texts
    if case.error:
        assert answer.status == case.error[0] and case.error[1] in answer.error, answer
    else:
        assert prompts[-1].endswith(case.prompt_end), prompts[-1]
        assert len(set(answer.texts)) == case.body.get("n", 1), answer
    return answer


def judge(case: Case, wanted: Answer, got: Answer | None, prompts: list[str]) -> str:
    """`SAME`, or what is different."""
    if got is None:
        return "no answer"
    if got.unsupported:
        return f"{NO} {got.unsupported}"
    if case.error:
        status, phrase = case.error
        if got.status in (status, None) and phrase in got.error:
            return SAME
        return f"{got.status}: {got.error[:120]}"
    if got.error:
        return f"{got.status}: {got.error[:300]}"
    if not any(prompt.endswith(case.prompt_end) for prompt in prompts):
        return "another prompt"
    if got.texts != wanted.texts:
        return f"{got.texts} instead of {wanted.texts}"
    if (got.finish or wanted.finish) != wanted.finish or (got.tokens or wanted.tokens) != wanted.tokens:
        return f"{got.finish} {got.tokens} instead of {wanted.finish} {wanted.tokens}"
    return SAME


def record(server: LiveServer) -> list[str]:
    """The prompts that the server makes from now on, as text."""
    service, prompts = server.service, []
    start = service.start

    async def recording(engine, persona, turns, *more):
        ids = encode_turns(service.tokenizer, persona, turns)
        prompts.append(service.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return await start(engine, persona, turns, *more)

    service.start = recording
    return prompts


# --- the table -------------------------------------------------------------------------------------------------------


def examine(
    name: str, folder: Path, server: LiveServer, prompts: list[str], wanted: dict[str, Answer]
) -> tuple[list[str], bool]:
    """The lines of the report on one client, and whether all is as it should be."""
    prompts.clear()
    more: dict = {}
    try:
        if name == "sillytavern":
            version, answers, more = run_sillytavern(folder, f"{server.url}/v1", CASES, prompts)
        else:
            version, answers = run_driver(name, folder, f"{server.url}/v1", CASES)
    except NotAvailableError as error:
        return [f"| {name} | 没有 [not available] | {error} |"], True
    except Exception as error:
        return [f"| {name} | ? | {type(error).__name__}: {error} |"], False
    results = {case.name: judge(case, wanted[case.name], answers.get(case.name), prompts) for case in CASES}
    results |= {what: SAME if result is True else str(result) for what, result in more.items()}
    same = "、".join(case for case, result in results.items() if result == SAME)
    others = {case: result for case, result in results.items() if result != SAME}
    lines = [
        f"| {name} | {version} | {SAME} {same} |",
        *(f"| | {case} | {result} |" for case, result in others.items()),
    ]
    return lines, all(result.startswith(NO) for result in others.values())


def main(
    only: Annotated[list[str] | None, typer.Option(help="which clients; all by default")] = None,
    packages: Annotated[Path | None, typer.Option(help="folder for the packages, kept")] = None,
) -> None:
    """Try every client and print a table; the exit status is 1 if one that is here does not work."""
    print("| client | version | result |\n|---|---|---|")
    model, good = helpers.load("nano", dtype="float32", device_map="cpu"), True
    with tempfile.TemporaryDirectory() as temporary, nano_server(model, slots=4, api_key=KEY) as server:
        folder, prompts = (packages or Path(temporary)).absolute(), record(server)
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {case.name: expected(server, prompts, case) for case in CASES}
        for name in only or [*PYTHON, *NODE, "sillytavern"]:
            lines, as_it_should = examine(name, folder, server, prompts, wanted)
            print("\n".join(lines), flush=True)
            good = good and as_it_should
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
