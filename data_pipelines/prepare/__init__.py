"""Preparation: from pictures and captions to the token files that training reads."""
