"""What every face of the demo says and lets the reader set: labels in Chinese and English, the meter, errors."""

import re
from pathlib import Path

from ..chat.session import ChatSession
from ..errors import HelpersError
from ..model.loading import NANO_DIR

TEXTS = {
    "title": ("CharacterGLM 角色扮演", "Role play with CharacterGLM"),
    "character": ("角色", "Character"),
    "message": ("说点什么…（Enter 发送）", "Say something… (Enter sends)"),
    "send": ("发送", "Send"),
    "stop": ("停止", "Stop"),
    "regenerate": ("重说", "Regenerate"),
    "previous": ("‹", "‹"),
    "next": ("›", "›"),
    "undo": ("撤回", "Undo"),
    "edit": ("编辑", "Edit"),
    "clear": ("清空", "Clear"),
    "save": ("保存", "Save"),
    "cancel": ("取消", "Cancel"),
    "query": ("你的话", "Your message"),
    "response": ("回复", "Reply"),
    "persona": ("人设", "Persona"),
    "bot_name": ("角色名 bot_name", "Character's name (bot_name)"),
    "bot_info": ("人设 bot_info", "Persona (bot_info)"),
    "user_name": ("你的名字 user_name", "Your name (user_name)"),
    "user_info": ("你的身份 user_info", "Who you are (user_info)"),
    "greeting": ("开场白 greeting", "First line (greeting)"),
    "apply": ("应用人设（对话保留）", "Apply (keeps the conversation)"),
    "parameters": ("参数", "Parameters"),
    "files": ("导入与导出", "Import and export"),
    "export": ("导出对话和角色卡", "Export conversation and card"),
    "import": ("导入对话或角色卡", "Open a conversation or a card"),
    # of the web page
    "characters": ("和谁聊？", "Who do you want to talk to?"),
    "conversations": ("接着聊", "Go on with"),
    "search": ("找角色或对话…", "Find a character or a conversation…"),
    "home": ("‹ 角色", "‹ Characters"),
    "new": ("新对话", "New chat"),
    "theme": ("明暗", "Light or dark"),
    "conversation": ("对话", "Conversation"),
    "continue": ("继续", "Continue"),
    "impersonate": ("替我说", "Suggest my line"),
    "copy": ("复制", "Copy"),
    "branch": ("从这里另开一段", "Branch from here"),
    "delete": ("删掉这一轮", "Delete this exchange"),
    "cut": ("从这里往后都删掉", "Delete from here on"),
    "previous_reply": ("上一个回复", "Previous reply"),
    "next_reply": ("下一个回复", "Next reply"),
    "sure": ("删掉就找不回来了，要删吗？", "What is deleted cannot be brought back. Delete it?"),
    "name": ("对话的名字", "Name of the conversation"),
    "rename": ("改名", "Rename"),
    "drop": ("删除这段对话", "Delete this conversation"),
    "unapplied": ("应用人设（有修改还没应用）", "Apply (changes are not in force yet)"),
    "reset": ("恢复默认", "Back to the defaults"),
    "export_all": ("导出全部对话", "Export all conversations"),
    "duet": ("两个角色对谈", "Two characters talk"),
    "other": ("和谁", "With whom"),
    "topic": ("聊什么", "About what"),
    "start": ("开始", "Start"),
    "go_on": ("让他们接着聊", "Let them go on"),
    "fit": ("把人设裁到能放下", "Cut the persona to what fits"),
    "settings": ("人设、参数、文件", "Persona, parameters, files"),
    "context": ("上下文用了多少", "How full the context is"),
    "nano": (
        "CharacterGLM-Nano：练手用的小替身，不是 6B",
        "CharacterGLM-Nano: a small stand-in, not the 6B",
    ),
    "model": ("模型：{name}，{billions:.1f}B 参数", "Model: {name}, {billions:.1f}B parameters"),
}
# Key phrase of an error: what the page says instead, as it has buttons and no methods. {total}, ...: attributes of the error.
PAGE_ERRORS = {
    "busy": ("回复还没写完 [busy]：等它结束，或按“停止”", "Busy: wait for the reply to end, or press Stop"),
    "empty text": (None, "Empty text: write something first"),
    "no exchange yet": ("还没有说过话 [no exchange yet]：先说一句", "No exchange yet: say something first"),
    "nothing to edit": (None, "Nothing to edit yet"),
    "nothing to answer": (None, "Nothing to answer yet: say something first"),
    "page expired": (None, "Page expired: the server was started anew. Please reload the page"),
    "conversation gone": (None, "Conversation gone: it was renamed or deleted in another tab"),
    "name taken or empty": (None, "Name taken or empty: please choose another one"),
    "same name": (None, "Same name: two characters of one name cannot be told apart"),
    "empty topic": (None, "Empty topic: write a few words, such as 月亮 (the moon)"),
    "prompt too long": (
        None,
        "Prompt too long: {total} tokens (the persona {persona}), at most {context} together with the reply",
    ),
}
# Tokens used of the context, exchanges left out of it, seconds to the first token, tokens per second after that.
METER = {
    "zh": ("上下文 {:,} / {:,} token", "，最早的 {} 轮已放不下", " · 首字 {:.2f} 秒", "，之后每秒 {:.0f} token"),
    "en": (
        *("context {:,} / {:,} tokens", ", the oldest {} turns no longer fit"),
        *(" · first token after {:.2f} s", ", then {:.0f} tokens/s"),
    ),
}
KEY_PHRASE = re.compile(r" ?\[([a-z][\w ,'-]+)\]")  # of an error, in English
PERSONA_FIELDS = ("bot_name", "bot_info", "user_name", "user_info", "greeting")
# Parameter: (lowest, highest, step). Beside these there is max_length, up to the model's context.
SLIDERS = {"temperature": (0.05, 2.0, 0.05), "top_p": (0.05, 1.0, 0.05), "repetition_penalty": (1.0, 2.0, 0.05)}
DOUBLE_CLICK_SECONDS = 0.5  # a second click within this time counts as part of the first


def label(key: str, language: str = "zh") -> str:
    return TEXTS[key][language == "en"]


def slider_values(session: ChatSession, context: int) -> dict[str, tuple[float, float, float]]:
    """Name: (value, lowest, highest) of every slider; an imported value may lie outside the usual range."""
    ranges = {name: (low, high) for name, (low, high, _) in SLIDERS.items()} | {"max_length": (64, context)}
    values = {name: getattr(session.parameters, name) or context for name in ranges}  # None: the whole context
    return {
        name: (values[name], min(low, values[name]), max(high, values[name])) for name, (low, high) in ranges.items()
    }


def meter_text(session: ChatSession, language: str = "zh") -> str:
    context, dropped, first, speed = METER[language]
    text = context.format(*session.context_used())
    if session.dropped_turns:
        text += dropped.format(session.dropped_turns)
    if statistics := session.statistics:
        text += first.format(statistics["time_to_first_token"])
        if statistics["tokens_per_second"]:  # None for a reply of one token
            text += speed.format(statistics["tokens_per_second"])
    return text


def model_text(model, language: str = "zh") -> str:
    """One line on who writes the replies."""
    folder = Path(model.name_or_path).resolve()
    if folder == NANO_DIR:
        return label("nano", language)
    return label("model", language).format(name=folder.name, billions=model.num_parameters() / 1e9)


def error_text(error: BaseException, language: str | None = None) -> str:
    """One line for the reader; an error that is not ours is named, as nothing better is known of it.

    With the `language` of a page it speaks of buttons, and in English the key phrase comes first.
    """
    text = str(error) if isinstance(error, HelpersError) else f"出错了 [error]：{type(error).__name__}: {error}"
    found = KEY_PHRASE.search(text) if language else None
    if found is None:
        return text
    chinese, english = PAGE_ERRORS.get(found[1], (None, None))
    if language == "zh":
        return chinese or text
    return english.format(**vars(error)) if english else f"{found[1].capitalize()} ({text.replace(found[0], '', 1)})"
