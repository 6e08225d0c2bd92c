"""What every face of the demo says and lets the reader set: labels in Chinese and English, the meter, errors."""

from ..chat.session import ChatSession
from ..errors import HelpersError

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
}
# Tokens used of the context, exchanges left out of it, seconds to the first token, tokens per second after that.
METER = {
    "zh": ("上下文 {:,} / {:,} token", "，最早的 {} 轮已放不下", " · 首字 {:.2f} 秒", "，之后每秒 {:.0f} token"),
    "en": (
        *("context {:,} / {:,} tokens", ", the oldest {} turns no longer fit"),
        *(" · first token after {:.2f} s", ", then {:.0f} tokens/s"),
    ),
}
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


def error_text(error: BaseException) -> str:
    """One line for the reader; an error that is not ours is named, as nothing better is known of it."""
    return str(error) if isinstance(error, HelpersError) else f"出错了 [error]：{type(error).__name__}: {error}"
