"""The layers a decoder is made of."""
