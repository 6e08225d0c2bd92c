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
PERSONA_FIELDS = ("bot_name", "bot_info", "user_name", "user_info", "greeting")
# Parameter: (lowest, highest, step). Beside these there is max_length, up to the model's context.
SLIDERS = {"temperature": (0.05, 2.0, 0.05), "top_p": (0.05, 1.0, 0.05), "repetition_penalty": (1.0, 2.0, 0.05)}
DOUBLE_CLICK_SECONDS = 0.5  # a second click within this time counts as part of the first


def label(key: str, language: str = "zh") -> str:
    """A text of the page; `language` is "zh" or "en"."""
    return TEXTS[key][language == "en"]


def meter_text(session: ChatSession, language: str = "zh") -> str:
    """Tokens used of the context and, once there is a reply, its speed."""
    zh = language == "zh"
    used, limit = session.context_used()
    text = f"上下文 {used:,} / {limit:,} token" if zh else f"context {used:,} / {limit:,} tokens"
    if dropped := session.dropped_turns:
        text += f"，最早的 {dropped} 轮已放不下" if zh else f", the oldest {dropped} turns no longer fit"
    if statistics := session.statistics:
        first, speed = statistics["time_to_first_token"], statistics["tokens_per_second"]
        text += f" · 首字 {first:.2f} 秒" if zh else f" · first token after {first:.2f} s"
        if speed:
            text += f"，之后每秒 {speed:.0f} token" if zh else f", then {speed:.0f} tokens/s"
    return text


def error_text(error: BaseException) -> str:
    """One line for the reader; an error that is not ours is named, as nothing better is known of it."""
    return str(error) if isinstance(error, HelpersError) else f"出错了 [error]：{type(error).__name__}: {error}"
