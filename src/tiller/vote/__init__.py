"""Preferences of people: a page on which two pictures of a prompt are compared, and what its votes are good for."""
