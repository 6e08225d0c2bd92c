"""What notebooks show: the X-ray of a prompt and the preflight table."""

import helpers
from helpers.inspect.preflight import Check, Preflight


def test_xray_names_the_id_that_ends_a_line():
    _, tokenizer = helpers.load("nano")
    card = helpers.SessionMeta(bot_name="甲", user_name="乙")
    xray = helpers.prompt_xray(tokenizer, card, [{"role": "user", "content": "你好"}])
    assert [token_id for token_id, *_ in xray.tokens].count(13) == 2  # the persona's line and the user's
    assert xray._repr_html_().count("↵13</span><br>") == 2
    assert [line.split(":")[0] for line in repr(xray).splitlines()] == [
        "前缀 prefix",
        "人设 persona",
        "用户 user",
        "回复从这里开始 reply starts here",
    ]


def test_preflight_table_reads_from_the_left_and_cuts_no_text():
    advice = "这一步没有做完，" * 20
    table = Preflight([Check("设备", "CPU", advice)])._repr_html_()
    assert advice in table
    assert table.count('<td style="text-align: left">') == 3 and "<td>" not in table
