"""One call on a target that several processes (ranks) hold together: the first decides, the others follow."""
