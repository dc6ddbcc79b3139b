"""What a run will take, said before anything is loaded: from the recipe and the headers of the weights."""
