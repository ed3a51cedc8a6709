package channel

// Interest says which messages a layer does anything with. A layer promises by
// it to pass all others on as they are; where the layer runs as a process of
// its own, they do not leave the node. A nil Interest is one in all messages.
type Interest struct {
	// Any: at least one of these bits is set; 0 sets no condition.
	Any Options `json:"any,omitempty"`
	// None: none of these bits is set.
	None Options `json:"none,omitempty"`
	// MinSize and MaxSize bound the body in bytes; 0 sets no bound. A MaxSize
	// below 0 means no message at all.
	MinSize int `json:"min_size,omitempty"`
	MaxSize int `json:"max_size,omitempty"`
}

// Match reports whether a message with these options and a body of that many
// bytes is of interest.
func (i *Interest) Match(o Options, size int) bool {
	return i == nil ||
		(i.Any == 0 || o&i.Any != 0) && o&i.None == 0 &&
			size >= i.MinSize && (i.MaxSize == 0 || size <= i.MaxSize)
}
