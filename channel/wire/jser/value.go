package jser

import (
	"math/big"

	"github.com/longhouse-go/longhouse/channel"
)

// Value is one of the Go types in the table of the package comment, or nil for
// null. Values may share parts; they never contain themselves.
type Value = any

type (
	// Char is a java.lang.Character: a UTF-16 unit.
	Char uint16
	// Date is a java.util.Date, in milliseconds since 1970.
	Date int64
	// UUID is a java.util.UUID.
	UUID [16]byte
	// Enum is a constant of an enumeration.
	Enum struct{ Class, Name string }
	// Block is bytes that a class has written among its items, see [Parse].
	Block []byte
)

// Array is an array of objects.
type Array struct {
	// Class is the array's own class name, "[Ljava.lang.Object;".
	Class string
	Items []Value

	uid *Class // as read, if it is not listed
}

// List is a java.util list.
type List struct {
	// Class is ArrayList if empty; else it, LinkedList, ArrayDeque, Vector,
	// Stack, ArraysList, EmptyList or ListOf.
	Class string
	Items []Value
	// Capacity is what an ArrayList or Vector has room for; len(Items) is
	// written if it is less.
	Capacity int32
	// Grow is the capacityIncrement of a Vector.
	Grow int32
	// Array is the class of the array behind an Arrays$ArrayList, or empty for
	// that of java.lang.Object.
	Array string
}

// Set is a java.util set.
type Set struct {
	// Class is HashSet if empty; else it, LinkedHashSet, TreeSet, EmptySet or
	// SetOf.
	Class string
	Items []Value
	// Comparator is that of a TreeSet.
	Comparator Value

	buckets int32
	load    float32
}

// Entry is one entry of a [Map].
type Entry struct{ Key, Value Value }

// Map is a java.util map, in the order of the stream.
type Map struct {
	// Class is HashMap if empty; else it, LinkedHashMap, TreeMap, Hashtable,
	// ConcurrentHashMap, EmptyMap or MapOf.
	Class   string
	Entries []Entry
	// AccessOrder is that of a LinkedHashMap.
	AccessOrder bool
	// Comparator is that of a TreeMap.
	Comparator Value

	load               float32
	threshold, buckets int32
}

// Get returns the value of the entry with that key, a string or a number.
func (m *Map) Get(key Value) (Value, bool) {
	switch key.(type) {
	case string, bool, int8, int16, Char, int32, int64, float32, float64, UUID, Date, Enum:
		for _, e := range m.Entries {
			if e.Key == key {
				return e.Value, true
			}
		}
	}
	return nil, false
}

// Decimal is a java.math.BigDecimal: Unscaled · 10^-Scale.
type Decimal struct {
	Unscaled *big.Int
	Scale    int32
}

// Locale is a java.util.Locale.
type Locale struct{ Language, Script, Country, Variant, Extensions string }

// StringBuffer is a java.lang.StringBuffer or StringBuilder.
type StringBuffer struct {
	Builder bool
	Text    string
	// Capacity is how many characters it has room for, if more than it holds.
	Capacity int32
}

// RPCMessage is a Tribes RpcMessage.
type RPCMessage struct {
	// NoChannel says that it is a NoRpcChannelReply, which has no message.
	NoChannel bool
	Reply     bool
	UUID      []byte
	RPCID     []byte
	Message   Value
}

// ByteMessage is a Tribes ByteMessage inside an object stream.
type ByteMessage struct{ Data []byte }

// Member is a Tribes MemberImpl, or a StaticMember.
type Member struct {
	channel.Member
	Static bool
}

// Kinds of a MemberMessage.
const (
	MemberStart int32 = 1 + iota
	MemberStop
	MemberPing
)

// MemberMessage is a message of Tribes' StaticMembershipProvider.
type MemberMessage struct {
	Type int32
	// MembershipID is the channel's name and "-StaticMembership".
	MembershipID []byte
	Member       *Member
}

// Kinds of a MapMessage. The comments say to whom it is sent.
const (
	MapBackup         int32 = 1 + iota // the backup: value or diff
	MapRetrieveBackup                  // rpc to the backup
	MapProxy                           // the others: where it is
	MapRemove                          // all
	MapState                           // rpc to one: a list of MapProxy
	MapStart                           // rpc to all
	MapStop                            // all
	MapInit                            // rpc to all
	MapCopy                            // all: value, full map
	MapStateCopy                       // rpc to one: a list of MapCopy
	MapAccess                          // the backup: touched
	MapNotifyMember                    // the backup: primary has moved
	MapPing                            // rpc to all
)

// MapMessage is a message of Tribes' AbstractReplicatedMap. Absent byte strings
// and members are nil.
type MapMessage struct {
	Type  int32
	MapID []byte
	// Diff says that DiffValue is to be applied to the stored value.
	Diff                  bool
	Key, Value, DiffValue []byte
	Primary               *Member
	Nodes                 []*Member
}

// MapStateClass is the class of the [Enum] that answers a MapPing.
const MapStateClass = tribes + "tipis.AbstractReplicatedMap$State"

// Constants of the states of a map.
var (
	MapNew         = Enum{MapStateClass, "NEW"}
	MapTransferred = Enum{MapStateClass, "STATETRANSFERRED"}
	MapInitialized = Enum{MapStateClass, "INITIALIZED"}
	MapDestroyed   = Enum{MapStateClass, "DESTROYED"}
)

// Kinds of a SessionMessage.
const (
	SessionCreated          int32 = 1
	SessionExpired          int32 = 2
	SessionAccessed         int32 = 3
	SessionGetAll           int32 = 4
	SessionAllData          int32 = 12
	SessionDelta            int32 = 13
	SessionTransferComplete int32 = 14
	SessionChangeID         int32 = 15
	SessionNoContextManager int32 = 16
)

// SessionMessage is a Tomcat SessionMessageImpl. A nil string is null.
type SessionMessage struct {
	Event int32
	// Context is the manager's name; nil means every manager.
	Context   *string
	SessionID *string
	// Session holds a delta, sessions or a new id, see [DecodeDelta],
	// [DecodeSessions] and [DecodeUTF].
	Session  []byte
	UniqueID *string
	// Time is the sender's clock in milliseconds, 0 if never set.
	Time    int64
	TimeSet bool
	// Base is the timestamp of the base class, always 0.
	Base int64
}

// FileMessage is one part of a file of Tomcat's farm deployer.
type FileMessage struct {
	// Number counts from 1 to Total.
	Number int32
	Total  int64
	// Length is how many bytes of Data count.
	Length   int32
	Data     []byte
	FileName *string
	Context  *string
	Base     int64
}

// UndeployMessage is Tomcat's order to remove an application.
type UndeployMessage struct {
	Address  *Member
	Time     int64
	UniqueID *string
	Context  *string
}

// SingleSignOnEntry is a value of Tomcat's single sign on map. It holds a
// password: do not log it.
type SingleSignOnEntry struct {
	AuthType, Username, Password *string
	CanReauthenticate            bool
	// Sessions is a ConcurrentHashMap of keys to themselves, or nil.
	Sessions Value
	// Principal is what follows if there is one.
	HasPrincipal bool
	Principal    Value
}

// SingleSignOnKey names one session in a SingleSignOnEntry.
type SingleSignOnKey struct{ SessionID, Context, Host *string }

// SingleSignOnListener is Tomcat's session listener of single sign on.
type SingleSignOnListener struct {
	// Cluster says that it is the ClusterSingleSignOnListener.
	Cluster bool
	ID      *string
}

// Principal is a GenericPrincipal as Tomcat writes it.
type Principal struct {
	Name *string
	// Roles is an *Array of strings, or nil.
	Roles Value
	// User is the user principal, Attributes a *Map or nil.
	User, Attributes Value
}

// DeltaSession is a Tomcat session as a map value.
type DeltaSession struct{ Session }

// Class describes a class as a stream does.
type Class struct {
	Name string
	// UID is the serialVersionUID.
	UID uint64
	// Flags: 0x02 serializable, 0x01 with items of its own, 0x04 externalizable,
	// 0x08 in blocks, 0x10 enumeration.
	Flags  byte
	Fields []Field
	Super  *Class
}

// Field describes a field.
type Field struct {
	Name string
	// Type is the signature: "I", "[B", "Ljava/lang/String;".
	Type string
}

// Object is an object of a class that has no type here, as data.
type Object struct {
	Class *Class
	// Parts holds what each class has written, top super class first; for an
	// externalizable class only its own part.
	Parts []Part
}

// Part is what one class has written of an object.
type Part struct {
	Class *Class
	// Fields has one value per field of the class.
	Fields []Value
	// Items are what the class has written itself: values and [Block]s.
	Items []Value
}
