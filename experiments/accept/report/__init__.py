"""`specdec accept report`: one HTML file with everything in it, and its plots as one PNG."""
