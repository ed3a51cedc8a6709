package jser

import (
	"maps"
	"strings"
)

// Prefixes of class names.
const (
	lang    = "java.lang."
	util    = "java.util."
	tribes  = "org.apache.catalina.tribes."
	ha      = "org.apache.catalina.ha."
	auth    = "org.apache.catalina.authenticator."
	chm     = util + "concurrent.ConcurrentHashMap"
	locks   = util + "concurrent.locks."
	rpcName = tribes + "group.RpcMessage"
)

// Names of the listed classes that readers and writers branch on.
const (
	memberClass       = tribes + "membership.MemberImpl"
	staticMemberClass = tribes + "membership.StaticMember"
	noChannelClass    = rpcName + "$NoRpcChannelReply"
	byteMessageClass  = tribes + "ByteMessage"
	memberMsgClass    = tribes + "membership.StaticMembershipProvider$MemberMessage"
	mapMessageClass   = tribes + "tipis.AbstractReplicatedMap$MapMessage"
	memberArrayClass  = "[L" + tribes + "Member;"
	sessionMsgClass   = ha + "session.SessionMessageImpl"
	deltaSessionClass = ha + "session.DeltaSession"
	fileMsgClass      = ha + "deploy.FileMessage"
	undeployClass     = ha + "deploy.UndeployMessage"
	ssoEntryClass     = auth + "SingleSignOnEntry"
	ssoKeyClass       = auth + "SingleSignOnSessionKey"
	ssoListenerClass  = auth + "SingleSignOnListener"
	ssoClusterClass   = ha + "authenticator.ClusterSingleSignOnListener"
	principalClass    = "org.apache.catalina.realm.GenericPrincipal$SerializablePrincipal"
	decimalClass      = "java.math.BigDecimal"
	bigIntegerClass   = "java.math.BigInteger"
	localeClass       = util + "Locale"
	dateClass         = util + "Date"
	uuidClass         = util + "UUID"
	stringArrayClass  = "[L" + lang + "String;"
	objectArrayClass  = "[L" + lang + "Object;"
	stringBuffer      = lang + "StringBuffer"
	stringBuilder     = lang + "StringBuilder"
)

// Classes of List, Set and Map besides ArrayList, HashSet and HashMap.
const (
	ArrayList  = util + "ArrayList"
	LinkedList = util + "LinkedList"
	ArrayDeque = util + "ArrayDeque"
	Vector     = util + "Vector"
	Stack      = util + "Stack"
	ArraysList = util + "Arrays$ArrayList"
	EmptyList  = util + "Collections$EmptyList"
	ListOf     = util + "List.of" // written as java.util.CollSer

	HashSet       = util + "HashSet"
	LinkedHashSet = util + "LinkedHashSet"
	TreeSet       = util + "TreeSet"
	EmptySet      = util + "Collections$EmptySet"
	SetOf         = util + "Set.of" // written as java.util.CollSer

	HashMap           = util + "HashMap"
	LinkedHashMap     = util + "LinkedHashMap"
	TreeMap           = util + "TreeMap"
	Hashtable         = util + "Hashtable"
	ConcurrentHashMap = chm
	EmptyMap          = util + "Collections$EmptyMap"
	MapOf             = util + "Map.of" // written as java.util.CollSer

	collSer = util + "CollSer"
)

// classes are the descriptions that are written, those of Tomcat 10.1.60 and
// OpenJDK 17.
var classes = map[string]*Class{}

func declare(name string, uid uint64, flags byte, super string, fields ...string) {
	c := &Class{Name: name, UID: uid, Flags: flags}
	if super != "" {
		c.Super = classes[super]
		if c.Super == nil {
			panic("jser: " + name + " is declared before " + super)
		}
	}
	for _, f := range fields {
		t, n, _ := strings.Cut(f, " ")
		c.Fields = append(c.Fields, Field{n, t})
	}
	classes[name] = c
}

const (
	plain    = 0x02
	custom   = 0x03
	external = 0x0c
	enum     = 0x12
)

func init() {
	const (
		str    = "Ljava/lang/String;"
		member = "Lorg/apache/catalina/tribes/Member;"
		number = lang + "Number"
	)
	for class, uid := range map[string]uint64{
		"[Z": 0x578f203914b85de2, "[B": 0xacf317f8060854e0, "[S": 0xef832e06e55db0fa, "[C": 0xb02666b0e25d84ac,
		"[I": 0x4dba602676eab2a5, "[J": 0x782004b512b17593, "[F": 0x0b9c818922e00c42, "[D": 0x3ea68c14ab635a1e,
		stringArrayClass: 0xadd256e7e91d7b47, objectArrayClass: 0x90ce589f1073296c, memberArrayClass: 0x5ec4606b842d393c,
		"[L" + chm + "$Segment;": 0x52773f41329b3974,
	} {
		declare(class, uid, plain, "")
	}

	declare(number, 0x86ac951d0b94e08b, plain, "")
	declare(lang+"Boolean", 0xcd207280d59cfaee, plain, "", "Z value")
	declare(lang+"Byte", 0x9c4e6084ee50f51c, plain, number, "B value")
	declare(lang+"Short", 0x684d37133460da52, plain, number, "S value")
	declare(lang+"Character", 0x348b47d96b1a2678, plain, "", "C value")
	declare(lang+"Integer", 0x12e2a0a4f7818738, plain, number, "I value")
	declare(lang+"Long", 0x3b8be490cc8f23df, plain, number, "J value")
	declare(lang+"Float", 0xdaedc9a2db3cf0ec, plain, number, "F value")
	declare(lang+"Double", 0x80b3c24a296bfb04, plain, number, "D value")
	declare(lang+"Enum", 0, enum, "")
	declare(util+"concurrent.TimeUnit", 0, enum, lang+"Enum")
	declare(stringBuffer, 0x2f0707d9eac8ead3, custom, "", "I count", "Z shared", "[C value")
	declare(stringBuilder, 0x3cd5fb145a4c6acb, custom, "")

	declare(bigIntegerClass, 0x8cfc9f1fa93bfb1d, custom, number,
		"I bitCount", "I bitLength", "I firstNonzeroByteNum", "I lowestSetBit", "I signum", "[B magnitude")
	declare(decimalClass, 0x54c71557f981284f, custom, number, "I scale", "Ljava/math/BigInteger; intVal")
	declare(dateClass, 0x686a81014b597419, custom, "")
	declare(uuidClass, 0xbc9903f7986d852f, plain, "", "J leastSigBits", "J mostSigBits")
	declare(localeClass, 0x7ef811609c30f9ec, custom, "", "I hashcode",
		str+" country", str+" extensions", str+" language", str+" script", str+" variant")

	declare(ArrayList, 0x7881d21d99c7619d, custom, "", "I size")
	declare(LinkedList, 0x0c29535d4a608822, custom, "")
	declare(ArrayDeque, 0x207cda2e240da08b, custom, "")
	declare(Vector, 0xd9977d5b803baf01, custom, "", "I capacityIncrement", "I elementCount", "[Ljava/lang/Object; elementData")
	declare(Stack, 0x10fe2ac2bb09861d, plain, Vector)
	declare(ArraysList, 0xd9a43cbecd8806d2, plain, "", "[Ljava/lang/Object; a")
	declare(EmptyList, 0x7ab817b43ca79ede, plain, "")
	declare(EmptySet, 0x15f5721db403cb28, plain, "")
	declare(EmptyMap, 0x593614855adce7d0, plain, "")
	declare(collSer, 0x578eabb63a1ba811, custom, "", "I tag")
	declare(HashSet, 0xba44859596b8b734, custom, "")
	declare(LinkedHashSet, 0xd86cd75a95dd2a1e, plain, HashSet)
	declare(TreeSet, 0xdd98509395ed875b, custom, "")
	declare(HashMap, 0x0507dac1c31660d1, custom, "", "F loadFactor", "I threshold")
	declare(LinkedHashMap, 0x34c04e5c106cc0fb, plain, HashMap, "Z accessOrder")
	declare(TreeMap, 0x0cc1f63e2d256ae6, custom, "", "Ljava/util/Comparator; comparator")
	declare(Hashtable, 0x13bb0f25214ae4b8, custom, "", "F loadFactor", "I threshold")
	declare(locks+"AbstractOwnableSynchronizer", 0x33dfafb9ad6d6fa9, plain, "")
	declare(locks+"AbstractQueuedSynchronizer", 0x6655a843753f52e3, plain, locks+"AbstractOwnableSynchronizer", "I state")
	declare(locks+"ReentrantLock$Sync", 0xb81ea294aa445a7c, plain, locks+"AbstractQueuedSynchronizer")
	declare(locks+"ReentrantLock$NonfairSync", 0x658832e7537bbf0b, plain, locks+"ReentrantLock$Sync")
	declare(locks+"ReentrantLock", 0x6655a82c2cc86aeb, plain, "", "Ljava/util/concurrent/locks/ReentrantLock$Sync; sync")
	declare(chm+"$Segment", 0x1f364c905893293d, plain, locks+"ReentrantLock", "F loadFactor")
	declare(chm, 0x6499de129d87293d, custom, "", "I segmentMask", "I segmentShift",
		"[Ljava/util/concurrent/ConcurrentHashMap$Segment; segments")

	declare(memberClass, 0x8476f37b32953667, external, "")
	declare(staticMemberClass, 0xa32603887eb6b8a1, external, memberClass)
	declare(rpcName, 0x712a750ff274e509, external, "")
	declare(noChannelClass, 0x7bab8fb36a4b5ba6, external, rpcName)
	declare(byteMessageClass, 0x7f57970a7babe10d, external, "")
	declare(memberMsgClass, 1, plain, "", "I msgtype", member+" member", "[B membershipId")
	declare(mapMessageClass, 1, plain, "", "Z diff", "I msgtype", "[B diffvalue", "[B keydata", "[B mapId",
		"[Lorg/apache/catalina/tribes/Member; nodes", member+" primary", "[B valuedata")
	declare(MapStateClass, 0, enum, lang+"Enum")

	declare(ha+"ClusterMessageBase", 1, plain, "", "J timestamp")
	declare(sessionMsgClass, 2, plain, ha+"ClusterMessageBase", "I mEvtType", "J serializationTimestamp",
		"Z timestampSet", str+" mContextName", "[B mSession", str+" mSessionID", str+" uniqueId")
	declare("org.apache.catalina.session.StandardSession", 1, plain, "", "J creationTime", "Z isNew", "Z isValid",
		"J lastAccessedTime", "I maxInactiveInterval", "J thisAccessedTime",
		"Ljava/util/concurrent/ConcurrentMap; attributes", str+" id")
	declare(deltaSessionClass, 0x041d33b9b82ea975, external, "org.apache.catalina.session.StandardSession")
	declare(fileMsgClass, 2, plain, ha+"ClusterMessageBase", "I dataLength", "I messageNumber", "J totalNrOfMsgs",
		str+" contextName", "[B data", str+" fileName")
	declare(undeployClass, 2, plain, "", "J timestamp", member+" address", str+" contextName", str+" uniqueId")
	declare(ssoListenerClass, 1, plain, "", str+" ssoId")
	declare(ssoClusterClass, 1, plain, ssoListenerClass)
	declare(ssoEntryClass, 1, custom, "", "Z canReauthenticate", str+" authType", str+" password",
		"Ljava/util/Map; sessionKeys", str+" username")
	declare(ssoKeyClass, 1, plain, "", str+" contextName", str+" hostName", str+" sessionId")
	declare(principalClass, 1, plain, "", "Ljava/util/Map; attributes", str+" name",
		"Ljava/security/Principal; principal", "[Ljava/lang/String; roles")
}

// listed reports whether objects of the class may be read. Arrays are as good
// as their elements; those of Object and of interfaces hold what is read for
// itself.
func listed(name string) bool {
	if strings.HasPrefix(name, "[") {
		name = strings.TrimLeft(name, "[")
		if len(name) == 1 {
			return strings.Contains("ZBSCIJFD", name)
		}
		if !strings.HasPrefix(name, "L") || !strings.HasSuffix(name, ";") {
			return false
		}
		switch name = name[1 : len(name)-1]; name {
		case lang + "Object", lang + "String", lang + "Number", lang + "Comparable", lang + "CharSequence", "java.io.Serializable",
			util + "List", util + "Map", util + "Set", util + "Collection", tribes + "Member":
			return true
		}
	}
	return classes[name] != nil
}

// Dialect is the set of serialVersionUIDs that are written. A JVM refuses
// objects whose UID is not that of its own class.
type Dialect struct {
	// UIDs holds those that differ from Tomcat 10.1.60's, by class name.
	UIDs map[string]uint64
}

// Releases of Tomcat for [DialectOf].
const (
	Tomcat9   = "9.0"  // also 8.5
	Tomcat100 = "10.0" // also 10.1.0 to 10.1.39 and 11.0.0 to 11.0.5
	Tomcat101 = "10.1" // 10.1.40 and later, 11.0.7 and later
	TomcatDev = "main" // later than 11.0
)

// DialectOf returns the dialect of a release; ok is false if it is unknown.
func DialectOf(release string) (d *Dialect, ok bool) {
	switch release {
	case Tomcat9:
		return &Dialect{UIDs: map[string]uint64{memberClass: 0x2e21087915506d1c}}, true
	case Tomcat100:
		return &Dialect{UIDs: map[string]uint64{memberClass: 0x535528fd049659fe}}, true
	case Tomcat101:
		return &Dialect{}, true
	case TomcatDev:
		return &Dialect{UIDs: map[string]uint64{deltaSessionClass: 0xdd045826e8c5c102}}, true
	}
	return nil, false
}

// Clone returns a copy that can be changed.
func (d *Dialect) Clone() *Dialect {
	if d == nil {
		return &Dialect{}
	}
	return &Dialect{UIDs: maps.Clone(d.UIDs)}
}

func (d *Dialect) uid(c *Class) uint64 {
	if d != nil {
		if u, ok := d.UIDs[c.Name]; ok {
			return u
		}
	}
	return c.UID
}
