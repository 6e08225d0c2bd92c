"""Three thin faces on one `ChatSession` (notebook widgets, web page, terminal), and two characters who talk alone."""
