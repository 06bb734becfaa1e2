"""`musplit doctor`: what would keep this board from taking part, found before a run."""
