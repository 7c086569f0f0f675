// JeroMQ as peer.py has it: java Peer TYPE bind|connect ENDPOINT

import java.io.BufferedOutputStream;
import java.io.DataInputStream;
import java.io.DataOutputStream;
import java.io.EOFException;
import java.io.IOException;
import org.zeromq.ZMQ;

public class Peer {
    public static void main(String[] args) throws Exception {
        ZMQ.Context context = ZMQ.context(1);
        int type = ZMQ.class.getField(args[0]).getInt(null);
        ZMQ.Socket socket = context.socket(type);
        if (args[1].equals("bind")) {
            socket.bind(args[2]);
        } else {
            socket.connect(args[2]);
        }
        if (type == ZMQ.PUSH) {
            sendAll(socket, new DataInputStream(System.in));
        } else if (type == ZMQ.PULL) {
            receiveAll(socket, new DataOutputStream(
                new BufferedOutputStream(System.out)
            ));
        } else {
            Thread.currentThread().join();
        }
    }

    private static void sendAll(ZMQ.Socket socket, DataInputStream input) throws IOException {
        while (true) {
            int parts;
            try {
                parts = input.readInt();
            } catch (EOFException end) {
                return;
            }
            for (; parts > 0; parts--) {
                byte[] part = new byte[input.readInt()];
                input.readFully(part);
                socket.send(part, parts > 1 ? ZMQ.SNDMORE : 0);
            }
        }
    }

    private static void receiveAll(ZMQ.Socket socket, DataOutputStream output)
            throws IOException {
        java.util.List<byte[]> parts = new java.util.ArrayList<>();
        while (true) {
            parts.add(socket.recv(0));
            if (socket.hasReceiveMore()) {
                continue;
            }
            output.writeInt(parts.size());
            for (byte[] part : parts) {
                output.writeInt(part.length);
                output.write(part);
            }
            output.flush();
            parts.clear();
        }
    }
}
