"""Whose voice is it? Words by which the shipped characters speak of themselves, and duets between them."""

import re

import helpers
from helpers.characters.personas import load_characters
from helpers.demo.duet import converse

OWN_WORDS = {
    "孙悟空": r"俺|老孙",
    "诸葛亮": r"亮(?!堂|晶|光|的|了|些|着|亮|得|起|丽|出|一点)",
    "陈阿婆": r"阿婆|囡囡",
    "白小狸": r"本狐",
    "大黄": r"本喵|铲屎",
    "阿九": r"船长|百分之",
    "林黛玉": r"二哥哥|潇湘",
    "夏星野": r"超酷",
    "苏梦远": r"陆导",
}
TOPICS = ("月亮", "吃饭", "下雨", "朋友", "家乡", "音乐", "害怕的事", "明天", "读书", "礼物")


def wrong_voice(name: str, text: str) -> str:
    """The word of another character in what `name` says, or "". A name in 「我是…」 that is not the own one counts too."""
    for other, pattern in OWN_WORDS.items():
        if other != name and (match := re.search(pattern, text)):
            return match[0]
    others = "|".join(other for other in load_characters() if other != name)
    match = re.search(rf"我(?:是|叫)(?:{others})", text)
    return match[0] if match else ""


def duets(model, tokenizer, seed: int, lines: int = 6) -> list[dict]:
    """Ten conversations between shipped characters, and in which of their lines somebody else's words stand."""
    cards = list(load_characters().values())
    talks = []
    for number, topic in enumerate(TOPICS):
        first, second = cards[number % 14], cards[(number * 3 + 5) % 14]
        talk = converse(model, tokenizer, first, second, topic, turns=lines, seed=seed, max_new_tokens=60)
        said = talk.lines[1:]  # the first line is the topic
        talks.append(
            {"names": [first.bot_name, second.bot_name], "ended": talk.ended, "lines": [list(line) for line in said]}
        )
        talks[-1]["wrong"] = [wrong_voice(name, text) for name, text in said]
    return talks


def self_reference(model, tokenizer, lines: list[str]) -> dict[str, float]:
    """For each character with own words: the share of replies to `lines`, said by another character, that show them."""
    cards, shares = load_characters(), {}
    for name, pattern in OWN_WORDS.items():
        replies = [
            helpers.chat(model, tokenizer, cards[name], line, do_sample=False, max_new_tokens=60)[0] for line in lines
        ]
        shares[name] = sum(bool(re.search(pattern, reply)) for reply in replies) / len(replies)
    return shares
