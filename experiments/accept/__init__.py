"""`specdec accept`: how much of which drafts is accepted, by which rule, on which text."""
