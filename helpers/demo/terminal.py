"""The terminal face of the demo, `python -m helpers chat`: a prompt for people, one reply a line for scripts."""

import json
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..characters.cards import open_content
from ..characters.personas import MAX_FILE_BYTES, get_character
from ..chat.chat import read
from ..chat.fitting import ContextWarning
from ..chat.generation import GenerationParameters
from ..chat.session import ChatSession
from ..errors import ChatError
from ..model.loading import load
from .conversations import Conversations, change_persona, characters_with
from .duet import mirrored
from .files import exported_file
from .texts import error_text, meter_text

HELP = """\
/character [名字]        列出角色，或换一个角色；每个角色有自己的对话 [pick a character]
/persona [字段 内容]     看人设，或改一个字段，如 /persona bot_info 爱吃桃子 [persona]
/set [参数 值]           看生成参数，或改一个，如 /set temperature 0.7 [parameters]
/regenerate              重说上一句，原来的保留；也可以写 /regen [regenerate]
/continue                让上一句接着往下说 [continue]
/next /previous          在几个回复之间切换 [swipe]
/impersonate             替我想一句 [suggest my line]
/new                     和同一个角色另开一段对话 [new chat]
/undo                    撤回上一轮 [undo]
/edit query|reply 内容   改上一轮的任何一边 [edit]
/clear 或 clear          重新开始这段对话 [clear]
/save 文件               存成 .json 或 .md；角色卡存成 _card.json 或 _card.png [save]
/load 文件               打开导出的对话或角色卡 [load]
/help                    这张表 [help]
/exit 或 stop            离开，也可以按 Ctrl-D [leave]
Ctrl-C                   停下正在写的回复，写出的部分保留 [stop the reply]"""
ORIGINAL_WORDS = {"clear": "/clear", "stop": "/exit"}  # commands of the vendor's own terminal demo
SHORT = {"/regen": "/regenerate", "/prev": "/previous", "/quit": "/exit"}

# C0 and C1 control characters, and those that reverse the direction of writing.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` as one line that a terminal only prints: line breaks become spaces, other control characters "\N{REPLACEMENT CHARACTER}"."""
    return _CONTROL.sub(lambda match: " " if match[0].isspace() else "\N{REPLACEMENT CHARACTER}", text)


def start(model, character: str | None, *, loading: dict, file=None, once=None, **generation) -> None:
    """`python -m helpers chat`: at a prompt if both ends are a terminal, else a reply for every line of the input.

    Args:
        model, loading: for `helpers.load`.
        character: None: the adapter's own, or the first.
        file: an exported conversation or a card to open; `generation` goes before what it brings.
        once: answer only this.
    """
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused by the session, by name
    GenerationParameters.check(generation)  # before a model is loaded, which may take a minute
    characters = characters_with(loading.get("adapter"))
    if character is not None:
        get_character(character, characters)
    content = None if file is None else _read(file)
    if content is not None:
        open_content(content)  # a bad file, too, is refused before the model is loaded
    conversations = Conversations(*load(model, **loading), characters, character, **generation)
    if content is not None:
        conversations.open(content)
        conversations.session.set_generation(**generation)
    if once is None and sys.stdin.isatty() and sys.stdout.isatty():
        TerminalChat(conversations).run()
        return
    for line in [once] if once is not None else filter(str.strip, sys.stdin):
        print(plain(conversations.session.send(line)), flush=True)


class TerminalChat:
    """A chat at the prompt. `HELP` lists what can be typed."""

    def __init__(self, conversations: Conversations, console: Console | None = None):
        self.conversations = conversations
        self.console = console or Console(highlight=False)
        # Each takes what was typed after it, and raises if that makes no sense: the conversation then stays as it was.
        self.commands = {
            "/character": self._character,
            "/persona": self._persona,
            "/set": self._set,
            "/regenerate": lambda _: self._write(self.session.stream_again()),
            "/continue": self._continue,
            "/next": lambda _: self._swipe(1),
            "/previous": lambda _: self._swipe(-1),
            "/impersonate": self._impersonate,
            "/new": lambda _: (self.conversations.new(self.session.session_meta), self._show_conversation()),
            "/undo": lambda _: self._print(f"撤回了 [undone]：{self.session.undo()}", style="dim"),
            "/edit": self._edit,
            "/clear": lambda _: (self.session.clear(), self._show_conversation()),
            "/save": self._save,
            "/load": lambda name: (self.conversations.open(_read(name)), self._show_conversation()),
            "/help": lambda _: [self._print(line) for line in HELP.splitlines()],
        }

    @property
    def session(self) -> ChatSession:
        return self.conversations.session

    def run(self) -> None:
        """Read and answer lines until the reader leaves. Ctrl-C at the prompt takes two to leave."""
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then has editing and a history
        self._show_conversation()
        going_on, interrupted = True, False
        while going_on:
            try:
                going_on = self.enter(input(f"{plain(self.session.session_meta.user_name)}："))
                interrupted = False
            except EOFError:
                going_on = False
            except KeyboardInterrupt:
                going_on, interrupted = not interrupted, True
                self.console.line()
                self._print("再按一次 Ctrl-C 离开，或输入 /exit [press again to leave]", style="dim")

    def enter(self, line: str) -> bool:
        """Do what one line says, a message or a command; False if it is time to leave. Shows errors, raises none."""
        words = ORIGINAL_WORDS.get(line.strip(), line.strip())
        command, _, argument = words.partition(" ")
        command = SHORT.get(command, command)
        if command == "/exit":
            return False
        try:
            if command in self.commands:
                self.commands[command](argument.strip())
            elif command.startswith("/"):
                raise ChatError(f"没有这个命令 [unknown command]：{command}。/help 列出全部")
            elif words:
                self._write(self.session.stream(line))
        except Exception as error:  # whatever it is, the conversation is not lost
            self._print(error_text(error), style="red")
        return True

    # --- commands

    def _character(self, name: str) -> None:
        if not name:
            self._print("、".join(self.conversations.names))
            return
        self.conversations.show(name)
        self._show_conversation()

    def _persona(self, change: str) -> None:
        fields = dict(self.session.session_meta)
        name, _, text = change.partition(" ")
        if name and name not in fields:
            raise ChatError(f"人设没有这个字段 [unknown field]：{name}，可选：{'、'.join(fields)}")
        if name:
            fields[name] = text.strip()
            change_persona(self.session, fields)
        for field, value in fields.items():
            self._print(f"{field}：{value}")

    def _set(self, change: str) -> None:
        name, _, value = change.partition(" ")
        if name:
            with suppress(ValueError):  # no parameter is a text: it is refused with the name of the parameter
                value = json.loads(value)
            self.session.set_generation(**{name: value})
        values = self.session.parameters.model_dump(exclude_none=True)
        self._print("  ".join(f"{name}={value}" for name, value in values.items()))

    def _swipe(self, step: int) -> None:
        self.session.swipe(step)
        self._show(self.session.history[-1:])
        self._print(f"{self.session.alternative + 1}/{len(self.session.alternatives)}", style="dim")

    def _continue(self, _) -> None:
        self._write(read(self.session.tokenizer, self.session.begin_more()))
        self._show([["", self.session.history[-1][1]]])

    def _impersonate(self, _) -> None:
        mirror, line = mirrored(self.session)
        self._print(f"你可以说 [you might say]：{mirror.send(line)}", style="dim")

    def _edit(self, change: str) -> None:
        side, _, text = change.partition(" ")
        if side not in ("query", "reply"):
            raise ChatError("写法 [usage]：/edit query 内容，或 /edit reply 内容")
        self.session.edit(**{"query" if side == "query" else "response": text.strip()})
        self._show(self.session.history[-1:])

    def _save(self, name: str) -> None:
        path = _path(name)
        content = exported_file(self.session, path.name)
        try:
            with path.open("xb") as file:  # x: never over a file that is there
                file.write(content)
        except FileExistsError:
            raise ChatError(f"已经有这个文件 [file exists]：{path}。换个名字，原文件没有动") from None
        except OSError as error:
            raise ChatError(f"写不了这个文件 [cannot write file]：{path}（{error.strerror}）") from None
        self._print(f"已保存 [saved]：{path}", style="dim")

    # --- what is on the screen

    def _write(self, texts: Iterator[str]) -> None:
        """Print a reply while it grows. Ctrl-C ends it within one token."""
        with _on_ctrl_c(self.session.stop), closing(texts), warnings.catch_warnings():
            warnings.simplefilter("ignore", ContextWarning)  # the meter says it
            shown = next(texts)  # whatever is refused is refused here
            self._print(f"{self.session.session_meta.bot_name}：{shown}", end="")
            for text in texts:
                self._print(text[len(shown) :], end="")
                shown = text
        self.console.line()
        self._print(meter_text(self.session), style="dim")

    def _show_conversation(self) -> None:
        name = self.session.session_meta.bot_name
        self._print(f"和 {name} 的对话，/help 列出命令 [/help lists the commands]", style="dim")
        self._show(self.session.history)

    def _show(self, history: list[list[str]]) -> None:
        names = (self.session.session_meta.user_name, self.session.session_meta.bot_name)
        for name, text in [pair for entry in history for pair in zip(names, entry)]:
            if text:
                self._print(f"{name}：{text}")

    def _print(self, text: str, style: str = "", end: str = "\n") -> None:
        # A Text, because Rich would read a string as markup; soft_wrap leaves the breaking of lines to the terminal.
        self.console.print(Text(plain(text), style), end=end, soft_wrap=True)


def _path(name: str) -> Path:
    if not name:
        raise ChatError("缺少文件名 [file name required]：如 /save 对话.json、/load 对话.json")
    return Path(name).expanduser()


def _read(name: str) -> bytes:
    path = _path(name)
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)  # enough to be refused as too large
    except OSError as error:
        raise ChatError(f"读不了这个文件 [cannot read file]：{path}（{error.strerror}）") from None


@contextmanager
def _on_ctrl_c(action):
    """Ctrl-C calls `action`, instead of raising KeyboardInterrupt wherever the program happens to be."""
    before = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
