"""Forward passes of a target or a drafter: `Forward` makes parts, and the first runner that takes a part runs it."""
