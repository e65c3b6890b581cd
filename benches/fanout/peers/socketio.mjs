// Socket.IO: io.emit. A line with a number on standard input: so many messages.
import { createServer } from "node:http";
import { createInterface } from "node:readline";
import { Server } from "socket.io";
const [port, bytes] = process.argv.slice(2).map(Number);
const text = "x".repeat(bytes - 8);
const http = createServer();
const io = new Server(http, { transports: ["websocket"], perMessageDeflate: false, pingInterval: 600000, pingTimeout: 600000, serveClient: false });
http.listen({ port, host: "127.0.0.1", backlog: 4096 });
createInterface({ input: process.stdin }).on("line", (line) => {
  for (let i = 0; i < Number(line); i++) io.emit("m", text);
}).on("close", () => process.exit(0));
