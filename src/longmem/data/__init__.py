"""From text files to rows of token ids: readers, tokenizers, token cache, streams; and made-up facts."""
