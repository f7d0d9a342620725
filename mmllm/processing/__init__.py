"""The processor: conversations with media in, a batch with known token counts out."""
