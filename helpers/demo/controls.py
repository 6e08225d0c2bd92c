"""What the sliders and buttons of the notebook panel and of the web page have in common."""

# Parameter: (lowest, highest, step).
SLIDERS = {"temperature": (0.05, 2.0, 0.05), "top_p": (0.05, 1.0, 0.05), "repetition_penalty": (1.0, 2.0, 0.05)}
DOUBLE_CLICK_SECONDS = 0.5  # a second click within this time counts as part of the first
