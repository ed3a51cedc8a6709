import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.Serializable;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Semaphore;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;

import org.apache.catalina.tribes.ByteMessage;
import org.apache.catalina.tribes.Channel;
import org.apache.catalina.tribes.ChannelException;
import org.apache.catalina.tribes.ChannelListener;
import org.apache.catalina.tribes.Member;
import org.apache.catalina.tribes.group.GroupChannel;
import org.apache.catalina.tribes.group.Response;
import org.apache.catalina.tribes.group.RpcCallback;
import org.apache.catalina.tribes.group.RpcChannel;
import org.apache.catalina.tribes.group.interceptors.MessageDispatchInterceptor;
import org.apache.catalina.tribes.group.interceptors.TcpFailureDetector;
import org.apache.catalina.tribes.membership.MemberImpl;
import org.apache.catalina.tribes.transport.nio.NioReceiver;

/**
 * A node of Apache Tribes that is driven by lines on its standard input, as the
 * package cmd/internal/bench describes.
 */
public final class Bench implements ChannelListener, RpcCallback {
    static final int DATA = 0, REQUEST = 1, REPLY = 2;
    static final int STAMP_EVERY = 32;

    final GroupChannel channel = new GroupChannel();
    final RpcChannel rpc = new RpcChannel("bench".getBytes(), channel, this);
    final AtomicLong received = new AtomicLong();
    volatile long last;
    final List<Member> members = new ArrayList<>();
    final Map<Integer, Semaphore> waiting = new ConcurrentHashMap<>();
    final AtomicInteger ids = new AtomicInteger();

    public static void main(String[] args) throws Exception {
        new Bench().serve();
    }

    void serve() throws Exception {
        NioReceiver receiver = (NioReceiver) channel.getChannelReceiver();
        receiver.setAddress("127.0.0.1");
        receiver.setPort(Integer.getInteger("port", 4700));
        receiver.setAutoBind(1000);
        receiver.setUdpPort(Integer.getInteger("port", 4700) + 1000);
        channel.addInterceptor(new MessageDispatchInterceptor());
        channel.addInterceptor(new TcpFailureDetector());
        channel.addChannelListener(this);
        channel.start(Channel.SND_RX_SEQ | Channel.SND_TX_SEQ);
        MemberImpl local = (MemberImpl) channel.getLocalMember(false);
        System.out.println("ready " + hex(local.getData(false)));
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = in.readLine()) != null;) {
            String answer;
            try {
                answer = obey(line.trim().split(" +"));
            } catch (Throwable t) {
                answer = "error " + t;
            }
            System.out.println(answer.replace('\n', ' '));
        }
        System.exit(0);
    }

    String obey(String[] w) throws Exception {
        switch (w[0]) {
        case "join":
            members.add(MemberImpl.getMember(unhex(w[1])));
            return "ok";
        case "run":
            return run(w[1], Integer.parseInt(w[2]), Integer.parseInt(w[3]), Long.parseLong(w[4]));
        case "count":
            return "count " + received.get() + " " + last;
        case "reset":
            received.set(0);
            last = 0;
            return "ok";
        default:
            return "error unknown command";
        }
    }

    interface Send {
        void send() throws Exception;
    }

    Send sender(String option, int size) {
        byte[] body = new byte[size];
        Member[] to = members.toArray(new Member[0]);
        ByteMessage message = new ByteMessage(body);
        switch (option) {
        case "none":
            return () -> channel.send(to, message, 0);
        case "async":
            return () -> channel.send(to, message, Channel.SEND_OPTIONS_ASYNCHRONOUS);
        case "ack":
            return () -> channel.send(to, message, Channel.SEND_OPTIONS_USE_ACK);
        case "sync-ack":
            return () -> channel.send(to, message, Channel.SEND_OPTIONS_USE_ACK | Channel.SEND_OPTIONS_SYNCHRONIZED_ACK);
        case "udp":
            return () -> channel.send(to, message, Channel.SEND_OPTIONS_UDP);
        case "rpc":
            return () -> {
                Response[] r = rpc.send(new Member[] { to[0] }, message, RpcChannel.FIRST_REPLY, 0, 10000);
                if (r.length != 1) {
                    throw new ChannelException("no reply");
                }
            };
        case "echo":
            int id = ids.incrementAndGet();
            Semaphore reply = new Semaphore(0);
            body[0] = REQUEST;
            ByteBuffer.wrap(body).putInt(1, id);
            waiting.put(id, reply);
            return () -> {
                channel.send(new Member[] { to[0] }, message, 0);
                if (!reply.tryAcquire(10, TimeUnit.SECONDS)) {
                    throw new ChannelException("no reply");
                }
            };
        default:
            throw new IllegalArgumentException(option + ": not offered");
        }
    }

    String run(String option, int size, int senders, long millis) throws Exception {
        boolean waits = !(option.equals("none") || option.equals("async") || option.equals("udp"));
        int every = waits ? 1 : 16;
        Send[] sends = new Send[senders];
        for (int i = 0; i < senders; i++) {
            sends[i] = sender(option, size);
        }
        AtomicLong sent = new AtomicLong(), failed = new AtomicLong();
        Histogram[] histograms = new Histogram[senders];
        CountDownLatch done = new CountDownLatch(senders);
        long start = nanos();
        long stop = System.nanoTime() + millis * 1000000;
        for (int i = 0; i < senders; i++) {
            Send send = sends[i];
            Histogram h = histograms[i] = new Histogram();
            Thread t = new Thread(() -> {
                long ok = 0, bad = 0;
                for (;;) {
                    long begin = System.nanoTime();
                    if (ok + bad > 0 && begin > stop) { // once at least, however late it is
                        break;
                    }
                    for (int n = 0; n < every; n++) {
                        try {
                            send.send();
                            ok++;
                            if (n == 0) {
                                h.add(System.nanoTime() - begin);
                            }
                        } catch (Exception x) {
                            bad++;
                        }
                    }
                }
                sent.addAndGet(ok);
                failed.addAndGet(bad);
                done.countDown();
            });
            t.setDaemon(true);
            t.start();
        }
        done.await();
        long end = nanos();
        Histogram all = new Histogram();
        for (Histogram h : histograms) {
            all.merge(h);
        }
        return "ran " + sent + " " + failed + " " + start + " " + end + " " + all.at(0.5) + " " + all.at(0.9) + " "
                + all.at(0.99) + " " + all.at(0.999) + " " + all.max;
    }

    @Override
    public boolean accept(Serializable m, Member from) {
        return m instanceof ByteMessage;
    }

    @Override
    public void messageReceived(Serializable m, Member from) {
        count();
        byte[] body = ((ByteMessage) m).getMessage();
        if (body.length < 5 || body[0] == DATA) {
            return;
        }
        if (body[0] == REQUEST) {
            body[0] = REPLY;
            try {
                channel.send(new Member[] { from }, new ByteMessage(body), 0);
            } catch (ChannelException x) {
                System.err.println(x);
            }
            return;
        }
        Semaphore s = waiting.get(ByteBuffer.wrap(body).getInt(1));
        if (s != null) {
            s.release();
        }
    }

    void count() {
        if (received.incrementAndGet() % STAMP_EVERY == 0) {
            last = nanos();
        }
    }

    @Override
    public Serializable replyRequest(Serializable m, Member from) {
        count();
        return m;
    }

    @Override
    public void leftOver(Serializable m, Member from) {
    }

    static long nanos() {
        java.time.Instant now = java.time.Instant.now();
        return now.getEpochSecond() * 1000000000L + now.getNano();
    }

    static String hex(byte[] b) {
        StringBuilder s = new StringBuilder();
        for (byte x : b) {
            s.append(String.format("%02x", x));
        }
        return s.toString();
    }

    static byte[] unhex(String s) {
        byte[] b = new byte[s.length() / 2];
        for (int i = 0; i < b.length; i++) {
            b[i] = (byte) Integer.parseInt(s.substring(2 * i, 2 * i + 2), 16);
        }
        return b;
    }

    /** Counts by value, 64 steps for each power of two. */
    static final class Histogram {
        final long[] counts = new long[64 * 64];
        long n, max;

        void add(long v) {
            counts[index(Math.max(v, 1))]++;
            n++;
            max = Math.max(max, v);
        }

        static int index(long v) {
            int exponent = 63 - Long.numberOfLeadingZeros(v);
            int shift = Math.max(exponent - 6, 0);
            return shift == 0 ? (int) v : (shift << 6) + (int) (v >> shift);
        }

        void merge(Histogram o) {
            for (int i = 0; i < counts.length; i++) {
                counts[i] += o.counts[i];
            }
            n += o.n;
            max = Math.max(max, o.max);
        }

        long at(double q) {
            long left = (long) Math.ceil(q * n);
            for (int i = 0; i < counts.length; i++) {
                left -= counts[i];
                if (left <= 0 && counts[i] > 0) {
                    if (i < 128) {
                        return i;
                    }
                    int shift = (i >> 6) - 1;
                    return ((long) (i & 63) + 64) << shift;
                }
            }
            return 0;
        }
    }
}
