"""From what a user says to what a network reads."""
