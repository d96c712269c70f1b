"""The prompter on the workstation: pairs of a wish and a prompt, training, and what is deployed."""
