"""Faces and icons as inline SVG: a card's own picture, what it asks for in `face`, or what the name happens to give."""

import base64
import io
import re

from PIL import ImageOps

from ..characters.card_files import open_image
from ..characters.personas import SessionMeta

PICTURE = "data:image/jpeg;base64,"  # so begins a `face` that is a picture; a browser runs nothing in a JPEG
INK = "#3b2f2f"
SKINS = {"cat": "#f2a65a", "fox": "#f7ede2", "monkey": "#d9a066", "robot": "#cfd8e3"}
ROUND = '<circle cx="24" cy="23" r="11" fill="{skin}"/>'
EYES = (
    '<circle cx="20" cy="23" r="1.4"/><circle cx="28" cy="23" r="1.4"/>'
    f'<path d="M21 28q3 2.4 6 0" fill="none" stroke="{INK}" stroke-width="1.3" stroke-linecap="round"/>'
)
# What lies behind the head, and what lies on it. {hair} and {cloth} are colours.
BEHIND = {
    "long": '<path d="M11 42V23c0-20 26-20 26 0v19z" fill="{hair}"/>',
    "bun": '<circle cx="24" cy="8" r="5" fill="{hair}"/>',
    "cat": '<path d="M13 20V6l9 7zM35 20V6l-9 7z" fill="{skin}"/>',
    "fox": '<path d="M12 21 9 4l13 9zM36 21l3-17-13 9z" fill="#d9793d"/>',
    "monkey": '<circle cx="12" cy="23" r="4" fill="{skin}"/><circle cx="36" cy="23" r="4" fill="{skin}"/>',
    "robot": '<path d="M23 5h2v9h-2z"/><circle cx="24" cy="5" r="2.5" fill="#e4572e"/>',
}
ON = {
    "short": '<path d="M13 21c0-13 22-13 22 0-4-5-8-6-11-6s-7 1-11 6z" fill="{hair}"/>',
    "long": '<path d="M13 23c0-15 22-15 22 0-3-7-8-8-11-8s-8 1-11 8z" fill="{hair}"/>',
    "bun": '<path d="M13 20c2-11 20-11 22 0-7-4-15-4-22 0z" fill="{hair}"/>',
    "hat": '<path d="M10 18q14-5 28 0l-5-9q-9-4-18 0z" fill="{cloth}"/>',
    "band": '<path d="M13 18q11-5 22 0v2.5q-11-5-22 0z" fill="#f2c14e"/>',
    "beard": '<path d="M15 26c1 15 17 15 18 0-3 4-5 4-9 4s-6 0-9-4z" fill="{hair}"/>',
    "glasses": '<g fill="none" stroke="#444"><circle cx="20" cy="23" r="3.5"/><circle cx="28" cy="23" r="3.5"/></g>',
    "flower": '<circle cx="33" cy="14" r="3" fill="#e8638c"/><circle cx="33" cy="14" r="1.2" fill="#fff"/>',
    "cat": '<path d="M8 25l7 1M8 29l7-1M40 25l-7 1M40 29l-7-1" stroke="#444" stroke-width=".8"/>',
    "fox": '<path d="M24 26l-1.5-1.5h3z"/>',
}
ICONS = {
    "regenerate": "M13 8a5 5 0 1 1-1.5-3.5L13 6M13 2v4H9",
    "continue": "M3 4l5 4-5 4zM9 4l5 4-5 4z",
    "edit": "M3 13l1-3 7-7 2 2-7 7z",
    "copy": "M6 6h7v7H6zM3 10V3h7",
    "branch": "M5 2v12M5 10q6 0 6-5M9 6l2-3 2 3",
    "delete": "M4 4l8 8M12 4l-8 8",
    "cut": "M3 3h10M3 7h5M9 9l5 5M14 9l-5 5",
    "previous": "M10 3L5 8l5 5",
    "next": "M6 3l5 5-5 5",
}


def icon(name: str) -> str:
    return f'<svg viewBox="0 0 16 16" class="cg-icon" aria-hidden="true"><path d="{ICONS[name]}"/></svg>'


def picture_face(picture: bytes) -> str:
    """The upper middle of a picture as a `face` of 96 x 96 pixels, some kilobytes of text; "" for one plain colour.

    Raises CharacterError.
    """
    image, file = open_image(picture).convert("RGB"), io.BytesIO()
    if image.getcolors(1):  # as `export_card_png` draws it where there is no picture
        return ""
    ImageOps.fit(image, (96, 96), centering=(0.5, 0.2)).save(file, "JPEG")
    return PICTURE + base64.b64encode(file.getvalue()).decode()


def face(name: str, features: str = "") -> str:
    """The inside of an SVG of 48 x 48: a picture, or keys of `BEHIND` and `ON`, by default two chosen by the name."""
    if re.fullmatch(rf"{PICTURE}[A-Za-z0-9+/=]+", features):
        return f'<image href="{features}" width="48" height="48"/>'
    number = sum(name.encode())
    wanted = features.split() or [("short", "long", "bun")[number % 3], ("glasses", "flower", "", "")[number // 3 % 4]]
    skin = next((SKINS[feature] for feature in wanted if feature in SKINS), ("#f6d7bd", "#eec39f")[number % 2])
    hair = "#e8e4df" if "old" in wanted else ("#2b2320", "#4a2f1f", "#1f2430")[number % 3]
    cloth = f"hsl({number % 360} 45% 42%)"
    head = '<rect x="13" y="13" width="22" height="20" rx="5" fill="{skin}"/>' if "robot" in wanted else ROUND
    parts = [f'<rect width="48" height="48" fill="hsl({number % 360} 55% 82%)"/>']
    parts += [BEHIND[feature] for feature in wanted if feature in BEHIND]
    parts += [f'<path d="M5 48c1-11 9-14 19-14s18 3 19 14z" fill="{cloth}"/>', head, EYES]
    parts += [ON[feature] for feature in wanted if feature in ON]
    return "".join(parts).replace("{skin}", skin).replace("{hair}", hair).replace("{cloth}", cloth)


def face_of(card: SessionMeta) -> str:
    """The face of a character, to be shown where its name stands beside it."""
    drawing = face(card.bot_name, getattr(card, "face", ""))
    return f'<svg viewBox="0 0 48 48" class="cg-face" aria-hidden="true">{drawing}</svg>'
