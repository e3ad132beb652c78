"""The oracle: scalar acceptance rules in exact rational arithmetic, and the whole law of one step by enumeration."""
