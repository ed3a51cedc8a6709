package bridge

// The kinds of frames. A number is never given a new meaning within one API
// version; unknown calls are answered with an error, unknown events are
// ignored.
const (
	// Calls by the node, all plugins.
	kindStart uint8 = 1
	kindStop  uint8 = 2
	// Calls by the node, managers.
	kindCommit  uint8 = 16
	kindLoad    uint8 = 17
	kindRelease uint8 = 18
	kindMessage uint8 = 19
	kindView    uint8 = 20
	kindStatus  uint8 = 21 // deployers too
	kindKeys    uint8 = 22
	kindWhere   uint8 = 23
	kindPrepare uint8 = 24
	// Calls by the node, memberships.
	kindLocal uint8 = 32
	// Calls by the node, interceptors.
	kindMember uint8 = 40
	kindTick   uint8 = 41
	kindFilter uint8 = 42
	// Events of the node, interceptors. The seq of all but kindNewView is the
	// number of a message.
	kindDown    uint8 = 48
	kindUp      uint8 = 49
	kindNewView uint8 = 50
	kindSkip    uint8 = 51
	kindResult  uint8 = 52
	// Calls by a plugin.
	kindSend   uint8 = 64
	kindResync uint8 = 65
	kindApply  uint8 = 66
	kindRemove uint8 = 67
	// Calls by a plugin, interceptors.
	kindForward uint8 = 68
	kindDeliver uint8 = 69
	// Events of a plugin.
	kindUpdate  uint8 = 80
	kindObserve uint8 = 81
	// Events of a plugin, interceptors. The seq of the first two is the number
	// of a message.
	kindVerdict  uint8 = 82
	kindEnd      uint8 = 83
	kindAnnounce uint8 = 84
)
