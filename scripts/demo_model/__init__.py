"""How the emoji demo model in ``models/emoji`` is made: data, training, contact sheet, judge."""
