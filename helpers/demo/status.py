"""What every face says below the conversation: how full the context is, how fast the last reply was, what went wrong."""

from ..chat.session import ChatSession
from ..errors import HelpersError

BUSY = "正在生成回复 [busy]：请等它结束，或按“停止”"


def meter_text(session: ChatSession, language: str = "zh") -> str:
    """Tokens used of the context and, once there is a reply, its speed; `language` is "zh" or "en"."""
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


def error_text(error: Exception) -> str:
    """One line for the reader; an error that is not ours is named, as nothing better is known of it."""
    return str(error) if isinstance(error, HelpersError) else f"出错了 [error]：{type(error).__name__}: {error}"
