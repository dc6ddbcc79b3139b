"""Judges that look at a picture and answer in words, and what is made of their answers."""
