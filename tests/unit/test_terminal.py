"""The terminal face: commands and pipes on CharacterGLM-Nano in this process, then `python -m helpers chat` as a program,
on real pseudo-terminals."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pexpect
import pytest
from rich.console import Console
from typer.testing import CliRunner

import helpers
from helpers.characters.personas import MAX_FILE_BYTES
from helpers.cli.app import app
from helpers.demo import terminal as terminal_module
from helpers.demo.conversations import Conversations, characters_with
from helpers.demo.files import open_file
from helpers.demo.terminal import TerminalChat, plain
from helpers.errors import CharacterError, HelpersError

GREEDY = {"do_sample": False, "max_new_tokens": 12}
CHAT = ("-m", "helpers", "chat", "--model", "nano")
TITLE = "\x1b]0;pwned\x07"  # renames the window of a terminal that gets it
PERSONA = {"bot_name": "小明", "bot_info": "学生", "user_name": "老师", "user_info": ""}


@pytest.fixture(scope="module")
def nano():
    return helpers.load("nano", dtype="float32", device_map="cpu")


@pytest.fixture
def chat(nano):
    conversations = Conversations(*nano, **GREEDY)
    return TerminalChat(conversations, Console(file=io.StringIO(), highlight=False, width=1000))


def printed(chat):
    """What was printed since the last call."""
    text = chat.console.file.getvalue()
    chat.console.file.seek(0)
    chat.console.file.truncate()
    return text


@contextmanager
def says(model, token_ids):
    """Make the model say these tokens, then a newline."""
    script = iter(token_ids)

    def hook(module, args, output):
        output.logits[:, -1, :] = -1e4
        output.logits[:, -1, next(script, 13)] = 1e4

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- lines and commands


def test_message_is_answered_and_measured(chat, nano):
    assert chat.enter("你好")
    query, reply = chat.session.history[-1]
    shown = printed(chat)
    assert query == "你好" and reply
    assert shown.startswith(f"苏梦远：{reply}\n上下文 ")
    assert re.search(r"上下文 \d+ / 2,048 token · 首字 \d+\.\d\d 秒，之后每秒 \d+ token\n$", shown)


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_blank_line_says_nothing(chat, line):
    before = chat.session.export()
    assert chat.enter(line)
    assert chat.session.export() == before and printed(chat) == ""


@pytest.mark.parametrize("word", ["clear", " clear ", "/clear"])
def test_clear(chat, word):
    chat.enter("你好")
    printed(chat)
    assert chat.enter(word)
    assert [query for query, _ in chat.session.history] == [""]
    assert "陆导您好" in printed(chat), "the greeting is said again"


@pytest.mark.parametrize("word", ["stop", "/exit", "/quit"])
def test_words_that_leave(chat, word):
    assert not chat.enter(word)


def test_regenerate_and_swipe(chat):
    chat.session.set_generation(do_sample=True, seed=1, temperature=2.0)
    chat.enter("你好")
    first = chat.session.history[-1][1]
    chat.enter("/regenerate")
    second = chat.session.history[-1][1]
    assert first != second, "the same seed must not write the same reply"
    printed(chat)
    chat.enter("/prev")
    assert chat.session.history[-1] == ["你好", first]
    assert first in printed(chat)
    chat.enter("/next")
    assert chat.session.history[-1] == ["你好", second]
    assert printed(chat).endswith("2/2\n")


def test_continue_goes_on_and_a_suggestion_changes_nothing(chat):
    chat.session.set_generation(max_new_tokens=4)
    chat.enter("你好")
    begun = chat.session.history[-1][1]
    chat.enter("/continue")
    assert len(chat.session.history[-1][1]) > len(begun) and chat.session.history[-1][1].startswith(begun)
    assert printed(chat).rstrip().endswith(chat.session.history[-1][1])
    before = chat.session.export()
    chat.enter("/impersonate")
    assert re.search(r"\[you might say\]：.+", printed(chat)) and chat.session.export() == before
    chat.enter("/new")
    assert chat.session.history != before["history"] and chat.conversations.sessions.keys() > {
        before["session_meta"]["bot_name"]
    }


def test_undo_and_edit(chat):
    chat.enter("你好")
    chat.enter("/edit query 早上好  呀")
    chat.enter("/edit reply 早！")
    assert chat.session.history[-1] == ["早上好  呀", "早！"]
    chat.enter("/undo")
    assert chat.session.history == [["", chat.session.session_meta.greeting]]
    assert "早上好  呀" in printed(chat)


def test_each_character_keeps_its_conversation(chat):
    chat.enter("你好")
    before = list(chat.session.history)
    chat.enter("/character 孙悟空")
    assert chat.session.session_meta.bot_name == "孙悟空"
    assert chat.session.generation == GREEDY
    chat.enter("/character 苏梦远")
    assert chat.session.history == before
    printed(chat)
    chat.enter("/character")
    assert set(printed(chat).strip().split("、")) == set(helpers.load_characters())


def test_persona_and_parameters(chat):
    chat.enter("/persona bot_info 爱吃 桃子")
    chat.enter("/persona greeting 来了？")
    assert chat.session.session_meta.bot_info == "爱吃 桃子"
    assert chat.session.history == [["", "来了？"]]
    chat.enter("/set temperature 0.7")
    chat.enter("/set do_sample true")
    assert chat.session.generation == {**GREEDY, "temperature": 0.7, "do_sample": True}
    assert "temperature=0.7" in printed(chat)


def test_help_names_every_command(chat):
    chat.enter("/help")
    shown = printed(chat)
    assert [command for command in chat.commands if command not in shown] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/nonsense", "unknown command"),
        ("/character 张三", "unknown character"),
        ("/persona bot_age 5", "unknown field"),
        ("/persona bot_name", "invalid persona"),
        ("/set temperature 0", "invalid generation parameter"),
        ("/set temperature NaN", "invalid generation parameter"),
        ("/set temperature hot", "invalid generation parameter"),
        ("/set tempreature 1", "unknown generation parameter"),
        ("/regen", "no exchange yet"),
        ("/continue", "no exchange yet"),
        ("/undo", "no exchange yet"),
        ("/edit 你好", "usage"),
        ("/save", "file name required"),
        ("/save 对话.txt", "unknown file type"),
        ("/save nowhere/chat.json", "cannot write file"),
        ("/load", "file name required"),
        ("/load missing.json", "cannot read file"),
        ("你" * 3000, "prompt too long"),
        ("\udce4\udcbd", "invalid Unicode"),
    ],
)
def test_refused_line_says_why_and_changes_nothing(chat, line, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = chat.session.export()
    assert chat.enter(line)
    assert f"[{problem}]" in printed(chat)
    assert chat.session.export() == before
    assert list(tmp_path.iterdir()) == []


def test_error_in_the_model_keeps_the_conversation(chat, nano):
    chat.enter("你好")
    before = chat.session.export()

    def fail(module, inputs):
        raise RuntimeError("CUDA out of memory")

    handle = nano[0].register_forward_pre_hook(fail)
    chat.enter("再说一句")
    handle.remove()
    assert "RuntimeError: CUDA out of memory" in printed(chat)
    assert chat.session.export() == before


# --- files


def test_save_and_load(chat, tmp_path):
    chat.enter("你好")
    saved = chat.session.export()
    chat.enter(f"/save {tmp_path}/我的 对话.json")
    chat.enter(f"/save {tmp_path}/chat.md")
    chat.enter(f"/save {tmp_path}/su_card.png")
    chat.enter("/clear")
    chat.enter(f"/load {tmp_path}/我的 对话.json")
    assert chat.session.export() == saved
    assert (tmp_path / "chat.md").read_text("utf-8") == chat.session.to_markdown()
    assert list(chat.conversations.sessions) == ["苏梦远", "苏梦远 (2)"], (
        "the conversation that was open is still there"
    )
    chat.enter(f"/load {tmp_path}/su_card.png")
    assert chat.session.session_meta == helpers.get_character("苏梦远")
    assert chat.session.generation == GREEDY


def test_save_overwrites_nothing(chat, tmp_path):
    file = tmp_path / "chat.json"
    file.write_text("precious")
    chat.enter(f"/save {file}")
    assert "[file exists]" in printed(chat)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "invalid JSON"),
        (b"\xff\xfe", "invalid JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"format": "other"}', "not an exported chat"),
        (b'{"spec": "chara_card_v3"}', "not a character card"),
        (b"\x89PNG\r\n\x1a\n rest", "no card in picture"),
        (b" " * (MAX_FILE_BYTES + 1), "file too large"),
    ],
)
def test_bad_file_is_refused(chat, tmp_path, content, problem):
    chat.enter("你好")
    before = chat.session
    history = list(before.history)
    (tmp_path / "bad.json").write_bytes(content)
    printed(chat)
    chat.enter(f"/load {tmp_path}/bad.json")
    assert f"[{problem}]" in printed(chat)
    assert chat.session is before and before.history == history and len(chat.conversations.sessions) == 1


# --- what reaches the terminal


def test_plain_leaves_text_and_takes_control_characters():
    assert plain("你好，[b]world[/b] :smile: 👨‍👩‍👧 é") == "你好，[b]world[/b] :smile: 👨‍👩‍👧 é"
    assert plain("一\r\n二\t三\u2028四") == "一  二 三 四"
    assert plain("\x1b[2J\x9b2J\x07\x00\x7f\u202e") == "�[2J�2J����"


def test_model_text_is_neither_markup_nor_control(chat, nano):
    model, tokenizer = nano
    attack = f"[red]红[/red] {TITLE}[/]"
    with says(model, tokenizer(attack, add_special_tokens=False)["input_ids"]):
        chat.session.set_generation(max_new_tokens=100, repetition_penalty=1.0)
        chat.enter("你好")
    assert chat.session.history[-1][1] == attack
    assert "苏梦远：[red]红[/red] �]0;pwned�[/]\n" in printed(chat)


# --- the command in a pipe


@pytest.fixture
def run_chat(nano, monkeypatch):
    monkeypatch.setattr(terminal_module, "load", lambda *args, **options: nano)
    return lambda *options, text="": CliRunner().invoke(app, [*CHAT[2:], *options], input=text)


def test_pipe_answers_line_by_line(nano, run_chat):
    done = run_chat("--no-do-sample", "--max-new-tokens", "12", text="你好\n\n/help\n再见")
    session = helpers.ChatSession(*nano, helpers.get_character("苏梦远"), **GREEDY)
    expected = [session.send(line) for line in ("你好", "/help", "再见")]
    assert done.exit_code == 0
    assert done.stdout.split("\n") == [*expected, ""]


def test_once_with_a_seed_repeats_itself(run_chat):
    options = ("--once", "讲个故事", "--seed", "3", "--temperature", "2.0", "--character", "孙悟空")
    first, second = run_chat(*options), run_chat(*options)
    assert first.exit_code == 0
    assert first.stdout == second.stdout
    assert len(first.stdout.strip()) > 0 and first.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "text", "problem"),
    [
        (["--once", " "], "", "empty text"),
        (["--character", "张三"], "你好", "unknown character"),
        (["--load", "missing.json", "--temperature", "0"], "你好", "invalid generation parameter"),
        ([], b"\xc4\xe3\n", "invalid Unicode"),
    ],
)
def test_failure_is_a_message_and_nothing_else(run_chat, options, text, problem):
    done = run_chat(*options, text=text)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert isinstance(done.exception, HelpersError) and f"[{problem}]" in str(done.exception)


def test_a_bad_file_is_refused_before_the_model_is_loaded(run_chat, monkeypatch, tmp_path):
    monkeypatch.setattr(terminal_module, "load", lambda *args, **options: pytest.fail("the model was loaded"))
    (tmp_path / "bad.json").write_text("{")
    done = run_chat("--load", str(tmp_path / "bad.json"), text="你好")
    assert isinstance(done.exception, HelpersError) and "[invalid JSON]" in str(done.exception)


def test_an_adapter_speaks_as_its_own_persona(nano, monkeypatch, tmp_path):
    """As in the API and in exported models; another character can still be asked for."""
    own = {**PERSONA, "bot_name": "阿青", "bot_info": "剑客，话很少"}
    (tmp_path / "card.json").write_text(json.dumps(own), encoding="utf-8")
    monkeypatch.setattr(terminal_module, "load", lambda *args, **options: nano)
    for options, persona in [([], own), (["--character", "林黛玉"], helpers.get_character("林黛玉"))]:
        options += ["--adapter", str(tmp_path), "--once", "你好", "--no-do-sample", "--max-new-tokens", "12"]
        done = CliRunner().invoke(app, [*CHAT[2:], *options])
        assert done.stdout.strip() == helpers.ChatSession(*nano, persona, **GREEDY).send("你好")


@pytest.mark.parametrize(("name", "position"), [("阿青", 0), ("林黛玉", 0)])
def test_the_persona_of_an_adapter_comes_first(tmp_path, name, position):
    (tmp_path / "card.json").write_text(json.dumps({**PERSONA, "bot_name": name, "bot_info": "剑客"}), encoding="utf-8")
    characters = characters_with(tmp_path)
    assert list(characters)[position] == name and characters[name].bot_info == "剑客"
    assert characters.keys() == helpers.load_characters().keys() | {name}
    assert characters_with(tmp_path / "no card") == characters_with(None) == helpers.load_characters()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "shown"), [("你好", 0, b""), (" ", 1, "错误 [error]：query 是空的 [empty text]".encode())]
)
def test_program_in_a_pipe_of_a_narrow_encoding(text, code, shown):
    env = {**os.environ, "PYTHONIOENCODING": "ascii:backslashreplace" if code == 0 else "utf-8", "LANG": "C"}
    done = subprocess.run([sys.executable, *CHAT, "--once", text], capture_output=True, timeout=300, env=env)
    assert done.returncode == code, done.stderr
    assert done.stdout.isascii() and bool(done.stdout.strip()) == (code == 0)
    assert shown in done.stderr and b"Traceback" not in done.stderr


# --- the program on a terminal


@contextmanager
def terminal(*options, **environment):
    """`python -m helpers chat` on a pseudo-terminal of 100 columns, once the first prompt is there."""
    env = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", **environment}
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    child = pexpect.spawn(
        sys.executable,
        [*CHAT, *options],
        env=env,
        timeout=120,
        dimensions=(40, 100),
        encoding=encoding,
        codec_errors="replace",
        # A shell that starts the tests in the background lets them, and what they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    child.delaybeforesend = 0.2
    try:
        yield child
    finally:
        child.close(force=True)


def interrupt_prompt(child):
    """Ctrl-C once the program waits for a line: Python overlooks one that comes while it sets the prompt up."""
    child.expect("陆星辰：")
    time.sleep(0.5)
    child.sendintr()


def test_ctrl_c_stops_the_reply_and_not_the_program(tmp_path):
    with terminal("--no-do-sample") as child:
        child.expect("陆星辰：")
        child.sendline("/set max_new_tokens 1500")
        child.sendline("/set min_new_tokens 1500")
        child.expect("min_new_tokens=1500")
        child.sendline("讲个很长的故事")
        child.expect("苏梦远：.{20}")  # it is written while it grows
        child.sendintr()
        child.expect(r"上下文 \d+ / 2,048 token")
        child.sendline(f"/save {tmp_path}/chat.json")
        child.expect("saved")
        child.sendline("/set min_new_tokens 0")
        child.expect("min_new_tokens=0")
        child.sendline("你好")
        child.expect("苏梦远：.*上下文")
        interrupt_prompt(child)
        child.expect("press again to leave")
        child.sendline("/undo")
        child.expect("撤回了.*你好")
        interrupt_prompt(child)
        child.expect("press again to leave")
        interrupt_prompt(child)
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
    query, partial = json.loads((tmp_path / "chat.json").read_text("utf-8"))["history"][-1]
    assert query == "讲个很长的故事" and len(partial) >= 20


@pytest.mark.slow
def test_ctrl_d_leaves():
    with terminal() as child:
        child.expect("陆星辰：")
        child.sendeof()
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0


@pytest.mark.slow
def test_no_control_sequence_of_a_file_reaches_the_terminal(tmp_path):
    card = {**PERSONA, "bot_name": f"小{TITLE}明", "greeting": "老师[bold]好\x1b[2J"}
    exported = {"format": "characterglm-chat/1", "session_meta": card, "generation": {}}
    exported["history"] = [["", "老师[bold]好\x1b[2J"], [f"坐下{TITLE}", "好的"]]
    (tmp_path / "chat.json").write_text(json.dumps(exported))
    with terminal("--load", str(tmp_path / "chat.json")) as child:
        child.expect("好的")
        shown = child.before
        child.sendline("/character 小\x16\x1b]0;pwned")  # Ctrl-V: the escape character is typed, not obeyed
        child.expect("unknown character")
        shown += child.before
        child.sendline("stop")
        child.expect(pexpect.EOF)
        shown += child.before
    assert "老师[bold]好�[2J" in shown and "坐下�]0;pwned�" in shown
    assert "\x1b]" not in shown and "\x1b[2J" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"LANG": "C", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "TERM": "dumb", "PYTHONIOENCODING": "gbk"}],
    ids=["ascii", "gbk"],
)
def test_terminal_without_utf8(environment):
    with terminal("--no-do-sample", **environment) as child:
        child.expect("/exit|/help")
        child.sendline("hello")
        child.expect("/ 2,048 token")
        child.sendline("/help")
        child.expect("/undo")
        child.sendline("/exit")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0


def test_a_plain_persona_begins_a_conversation(nano):
    persona = {"bot_name": "鲁智深", "bot_info": "自称洒家", "user_name": "林冲", "greeting": "陪洒家喝一碗！"}
    session = open_file(*nano, json.dumps(persona).encode(), seed=1)
    assert (session.session_meta.bot_name, session.history) == ("鲁智深", [["", "陪洒家喝一碗！"]])
    assert session.generation == {"seed": 1}
    with pytest.raises(CharacterError, match="user_name"):
        open_file(*nano, json.dumps(persona | {"user_name": ""}).encode())
