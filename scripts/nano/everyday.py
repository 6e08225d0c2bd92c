"""Everyday talk: what users say, by intent, and how each character answers it; see data/everyday/README.md."""

import hashlib
import json
import random
import re
from pathlib import Path

from helpers.characters.personas import SessionMeta

EVERYDAY = Path(__file__).parents[2] / "data" / "everyday"
HELD_OUT_SHARE = 0.2
FILLERS = (
    "哎，",
    "唉，",
    "嗯，",
    "对了，",
    "我说，",
    "那个，",
    "话说，",
    "哎呀，",
    "喂，",
    "你说，",
    "其实",
    "今天",
    "刚才",
    "我觉得",
)
# What the usual partner is called; anybody else is called by name.
ADDRESSES = {
    "苏梦远": "陆导",
    "林黛玉": "二哥哥",
    "孙悟空": "师父",
    "诸葛亮": "主公",
    "李白": "子美",
    "阿九": "船长",
    "陈阿婆": "囡囡",
    "夏星野": "一鸣",
    "白小狸": "书呆子",
    "大黄": "铲屎的",
}

# What else people call the characters, in front of a line or after it.
CALLS = {
    "苏梦远": ("小苏", "梦远", "苏老师", "远心"),
    "林黛玉": ("妹妹", "林妹妹", "颦儿", "黛玉", "林姑娘"),
    "孙悟空": ("悟空", "大圣", "猴哥", "大师兄", "猴子"),
    "诸葛亮": ("孔明", "军师", "先生", "丞相"),
    "李白": ("太白", "太白兄", "李兄", "诗仙"),
    "福尔摩斯": ("老福", "夏洛克", "大侦探", "福先生"),
    "沈知微": ("知微", "沈老板", "沈姐姐"),
    "阿九": ("九号", "小九", "阿九呀"),
    "陈阿婆": ("阿婆", "外婆", "婆婆"),
    "顾长风": ("长风", "顾大侠", "长风大哥", "顾兄"),
    "夏星野": ("星野", "小夏", "夏同学"),
    "白小狸": ("小狸", "小狐狸", "狐仙姑娘"),
    "大黄": ("黄黄", "大黄猫", "猫大爷"),
    "秦朗": ("秦医生", "秦老师", "秦大夫", "朗哥"),
}


def read_rows(file: Path) -> list[dict]:
    """The objects of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def held_out(value: str) -> bool:
    """Whether a slot value, name or persona never occurs in training: a fixed fifth, chosen by hash."""
    digest = hashlib.sha256(value.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


class Slots:
    """Values for {food}, {place} ... : those of training, or those held out."""

    def __init__(self, evaluation: bool = False, directory: Path = EVERYDAY):
        values = json.loads((directory / "slots.json").read_text(encoding="utf-8"))
        self.surnames, self.given = values.pop("surnames"), values.pop("given")
        self.evaluation = evaluation
        self.values = {slot: [v for v in every if held_out(v) == evaluation] for slot, every in values.items()}
        self.characters = sorted(set("".join([self.given, *(v for every in values.values() for v in every)])))
        self.invented_share = 0.0 if evaluation else 0.5

    def name(self, rng: random.Random) -> str:
        """A name put together from a surname and one or two characters, so that it can only be copied."""
        while True:
            given = "".join(rng.choices(self.given, k=rng.choice((1, 2, 2))))
            first = rng.choice(self.surnames) if rng.random() < 0.7 else rng.choice("小阿")
            if rng.random() < 0.1:
                first = ""
                given = "".join(rng.choices(self.given, k=2))
            if held_out(first + given) == self.evaluation:
                return first + given

    def draw(self, slot: str, rng: random.Random) -> str:
        """A value; {food2} is a food as well."""
        if slot == "name":
            return self.name(rng)
        if slot == "number":
            return str(rng.randint(3, 99))
        if rng.random() < self.invented_share:
            return self.invented(rng)
        return rng.choice(self.values[slot.rstrip("2")])

    def invented(self, rng: random.Random) -> str:
        """Two or three characters without a meaning: what nobody can know by heart must be looked up."""
        while held_out(value := "".join(rng.choices(self.characters, k=rng.choice((2, 2, 3))))):
            pass
        return value

    def fill(self, text: str, chosen: dict[str, str], rng: random.Random) -> str:
        """`text` with its slots replaced; values once chosen are kept in `chosen`."""

        def value(match) -> str:
            slot = match[1]
            if slot not in chosen:
                chosen[slot] = self.draw(slot, rng)
                if slot == "food2" and chosen[slot] == chosen.get("food"):
                    chosen[slot] = "一碗" + chosen[slot]
            return chosen[slot]

        return re.sub(r"\{(\w+)\}", value, text)


def address(session: SessionMeta, partner: str | None) -> str:
    """What the bot calls its user; `partner` is its usual one."""
    if session.user_name == partner:
        return ADDRESSES.get(session.bot_name, session.user_name)
    return session.user_name


class Deck:
    """An endless supply of items: all of them in random order, and again."""

    def __init__(self, items: list, rng: random.Random):
        self.items, self.rng, self.left = items, rng, []

    def draw(self):
        if not self.left:
            self.left = self.rng.sample(self.items, len(self.items))
        return self.left.pop()


class Everyday:
    """Exchanges of everyday talk for every character and every voice."""

    def __init__(self, rng: random.Random, slots: Slots, directory: Path = EVERYDAY):
        self.rng, self.slots = rng, slots
        self.lines = {row["intent"]: row["lines"] for row in read_rows(directory / "lines.jsonl")}
        self.replies = {}
        for file in [*sorted((directory / "replies").glob("*.jsonl")), directory / "voices.jsonl"]:
            for row in read_rows(file) if file.exists() else []:
                speaker = row.get("voice") or row["character"]
                # The first reply counts twice: of two equally likely ones a small model makes a mixture.
                texts = [row["replies"][0], *row["replies"]]
                self.replies.setdefault(speaker, []).extend((row["intent"], text) for text in texts)
        # What belongs to one character: its own world, and (three times as often) the first lines the page offers.
        own = [*read_rows(directory / "topics.jsonl"), *read_rows(directory / "openers.jsonl") * 3]
        for row in own:
            intent = row["lines"][0] + row["character"]
            self.lines[intent] = row["lines"]
            self.replies[row["character"]].append((intent, row["reply"]))
        self.line_decks = {intent: Deck(lines, rng) for intent, lines in self.lines.items()}
        self.by_intent = {}
        for speaker, replies in self.replies.items():
            for intent, text in replies:
                self.by_intent.setdefault((speaker, intent), []).append(text)
        self.decks = {speaker: Deck(replies, rng) for speaker, replies in self.replies.items()}

    def keep_first_replies(self) -> None:
        """Forget all but the first reply of each speaker to each intent."""
        for texts in self.by_intent.values():
            del texts[1:]
        for speaker in self.decks:
            first = [(intent, texts[0]) for (who, intent), texts in self.by_intent.items() if who == speaker]
            self.decks[speaker] = Deck(first, self.rng)

    def exchange(self, speaker: str, session: SessionMeta, partner: str | None, words: dict, facts: dict) -> list[str]:
        """[line, reply, intent] of the next intent of `speaker`, a character or a voice.

        `words` fills slots of both; `facts`, those of a generated persona, only where the reply speaks of itself.
        """
        intent, reply = self.decks[speaker].draw()
        user = session.user_name if intent == "name_me" else address(session, partner)
        chosen = words | {"user": user}
        template = self.line_decks[intent].draw()
        line = self.slots.fill(template, chosen, self.rng)
        reply = self.slots.fill(reply, facts | chosen, self.rng)
        return [vary(line, session.bot_name, self.rng, whole="{" in template), reply, intent]

    def reply(self, speaker: str, intent: str, chosen: dict[str, str]) -> str:
        """A reply of `speaker` to an intent, with the slots that the line has chosen; "" if there is none."""
        replies = self.by_intent.get((speaker, intent))
        return self.slots.fill(self.rng.choice(replies), chosen, self.rng) if replies else ""


def vary(line: str, bot_name: str, rng: random.Random, whole: bool) -> str:
    """Changes that no meaning depends on: the last mark, a call or a filler in front, characters left out.

    A model that meets the same 18,000 lines again and again knows them by heart; these keep it looking at every word.
    A line with a value in it stays `whole`: the reply may repeat the value.
    """
    if rng.random() < 0.3 and len(line) > 2:
        line = (
            line.rstrip("。！？")
            if line[-1] in "。！？"
            else line + rng.choice("。！？" if line[-1] in "呢吗" else "。！")
        )
    if not whole and rng.random() < 0.35 and len(line) > 4:
        gone = set(rng.sample(range(len(line)), rng.randint(1, max(1, len(line) // 6))))
        line = "".join(character for position, character in enumerate(line) if position not in gone)
    if rng.random() < 0.3 and len(line) < 30:
        name = rng.choice((bot_name, *CALLS.get(bot_name, ())))
        if rng.random() < 0.4 or bot_name in line:
            return rng.choice(FILLERS) + line
        line = f"{name}，{line}" if rng.random() < 0.6 else f"{line.rstrip('。！？')}，{name}"
    return line
